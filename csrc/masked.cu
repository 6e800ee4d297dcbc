// The masked sweeps on CUDA. A stage is two launches: the products with earlier stages, a warp for a panel of rows and
// a tile of 32 samples, over all multiprocessors; then what is sequential, a block for a tile with a barrier after each
// instruction. The host knows the program, so that nothing waits for the device.
#include "masked.h"

#include "masked_operators.h"
#include "simt.h"
#include "tensor.h"

namespace pygen {
namespace {

using masked::Instruction;
using masked::Kind;
using masked::kPanel;
using masked::Program;
using masked::Stage;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Tiles go through the program together as long as their rows fit into so many bytes.
constexpr int64_t kStateBytes = int64_t{256} << 20;

template <class T>
struct SweepData {
  Program program;   // on the device
  const T* samples;  // (n, columns)
  int64_t n, columns;
  const T* weights;
  const T* constants;
  T* out;           // (n, outputs)
  T* ladj;          // (n,), or nullptr
  T* state;         // (tiles, rows, 32)
  double* partial;  // (tiles, warps, 32): each warp's share of ladj
  int64_t first;    // sample of the first tile
};

// A lane's view of its tile.
template <class T>
struct Lane {
  const SweepData<T>& data;
  T* state;
  int64_t sample;

  __device__ __forceinline__ Lane(const SweepData<T>& sweep, int64_t tile)
      : data(sweep),
        state(sweep.state + tile * sweep.program.rows * kWarp + threadIdx.x % kWarp),
        sample(sweep.first + tile * kWarp + threadIdx.x % kWarp) {}

  __device__ __forceinline__ T& row(int64_t index) const { return state[index * kWarp]; }

  __device__ __forceinline__ T column(int64_t index) const {
    return sample < data.n ? data.samples[sample * data.columns + index] : T(0);
  }

  // A row, or ~column of the samples.
  __device__ __forceinline__ T value(int64_t operand) const { return operand >= 0 ? row(operand) : column(~operand); }
};

template <class T>
__device__ __forceinline__ T linear_start(const Instruction& in, int64_t i, const Lane<T>& lane) {
  if (in.d == masked::kContinue) return lane.row(in.row + i);
  return in.d == masked::kZero ? T(0) : lane.data.constants[in.d + i];
}

// Rows `first` .. of a linear instruction, kPanel at most, whose weights lie together.
template <class T>
__device__ __forceinline__ void multiply_panel(const Instruction& in, int64_t first, const Lane<T>& lane) {
  const int height = static_cast<int>(min(in.rows - first, int64_t{kPanel}));
  const T* weights = lane.data.weights + in.c + first * in.b;
  T sums[kPanel];
#pragma unroll
  for (int r = 0; r < kPanel; ++r) sums[r] = r < height ? linear_start(in, first + r, lane) : T(0);
  for (int64_t i = 0; i < in.b; ++i) {
    const T source = lane.row(in.a + i);
#pragma unroll
    for (int r = 0; r < kPanel; ++r) {
      if (r < height) sums[r] += weights[i * height + r] * source;
    }
  }
#pragma unroll
  for (int r = 0; r < kPanel; ++r) {
    if (r < height) lane.row(in.row + first + r) = sums[r];
  }
}

// The products of a stage that depend on no other of it: grid (tiles, instructions, parts of an instruction's panels).
template <class T>
__global__ void __launch_bounds__(kThreads) masked_products_kernel(SweepData<T> data, int64_t stage) {
  const Instruction in = data.program.instructions[data.program.stages[stage].begin + blockIdx.y];
  const Lane<T> lane(data, blockIdx.x);
  const int64_t step = static_cast<int64_t>(gridDim.z) * kWarps * kPanel;
  for (int64_t first = (blockIdx.z * kWarps + threadIdx.x / kWarp) * kPanel; first < in.rows; first += step) {
    multiply_panel(in, first, lane);
  }
}

// Few rows: a warp for each. Their weights lie as in multiply_panel.
template <class T>
__device__ __forceinline__ void linear_row(const Instruction& in, int64_t i, const Lane<T>& lane) {
  const int64_t first = i / kPanel * kPanel, height = min(in.rows - first, int64_t{kPanel});
  const T* weights = lane.data.weights + in.c + first * in.b + (i - first);
  T sum = linear_start(in, i, lane);
  for (int64_t k = 0; k < in.b; ++k) sum += weights[k * height] * lane.row(in.a + k);
  lane.row(in.row + i) = sum;
}

// x and its share of ladj for one input, from the rows of its parameters.
template <class T>
__device__ __forceinline__ T map_input(const AffineMap<T>& map, int64_t, T y, const T* parameters, double* ladj) {
  Scale<T> scale{T(1), T(0)};
  for_activation(map.activation,
                 [&](auto tag) { scale = affine_scale<decltype(tag)::value>(parameters[0] + map.offset, map.limit); });
  if (map.epsilon != T(0)) scale = add_epsilon(scale, map.epsilon);
  *ladj -= scale.log;
  return (y - parameters[kWarp]) / scale.value;
}

template <class T>
__device__ __forceinline__ T map_input(const SplineMap<T>& map, int64_t input, T y, const T* parameters, double* ladj) {
  T own[3 * kMaxBins + 1], x, log;
  for (int k = 0; k < map.options.parameters(); ++k) own[k] = parameters[k * kWarp];
  const SplineBounds<1, T> bounds{{map.bound(0, input)},
                                  {map.bound(1, input)},
                                  {map.bound(2, input)},
                                  {map.bound(3, input)},
                                  {map.bound(4, input)}};
  for_parametrization(map.parametrization,
                      [&](auto tag) { spline<decltype(tag)::value, true, 1>(&y, own, bounds, map.options, &x, &log); });
  *ladj += log;
  return x;
}

template <class T>
__device__ __forceinline__ T map_input(const NoMap&, int64_t, T y, const T*, double*) {
  return y;
}

template <class T>
__device__ __forceinline__ void solve(const Instruction& in, int64_t i, int64_t input, const Lane<T>& lane) {
  const int64_t features = in.d, per_input = in.c;
  const T x = lane.row(in.row + i) + lane.column(input);
  lane.row(in.row + i) = x;
  for (int64_t k = 0; k < per_input; ++k) {
    const int64_t a = features + input * per_input + k;
    lane.row(in.b + i * per_input + k) = lane.column(a) * x + lane.column(a + features * per_input);
  }
}

// Row i of an instruction.
template <class T, class Map>
__device__ __forceinline__ void execute(const Instruction& in, int64_t i, const Map& map, const Lane<T>& lane,
                                        double* ladj) {
  const SweepData<T>& data = lane.data;
  const int64_t* operands = data.program.operands + in.a;
  switch (in.kind) {
    case Kind::kLinear:
      linear_row(in, i, lane);
      return;
    case Kind::kActivation:
      masked::for_unit(in.b, [&](auto tag) {
        lane.row(in.row + i) = masked::activate<decltype(tag)::value>(lane.value(operands[i]), data.constants[in.c]);
      });
      return;
    case Kind::kAdd:
      lane.row(in.row + i) = lane.value(operands[2 * i]) + lane.value(operands[2 * i + 1]);
      return;
    case Kind::kMultiply:
      lane.row(in.row + i) = lane.value(operands[2 * i]) * lane.value(operands[2 * i + 1]);
      return;
    case Kind::kScale: {
      const T* pair = data.constants + in.c + 2 * i;
      lane.row(in.row + i) = lane.value(operands[i]) * pair[0] + pair[1];
      return;
    }
    case Kind::kTransform:
      lane.row(in.row + i) = map_input(map, operands[i], lane.column(operands[i]), &lane.row(in.b + i * in.c), ladj);
      return;
    case Kind::kAccumulate: {
      const T slope = operands[2 * i + 1] < 0 ? T(1) : lane.column(operands[2 * i + 1]);
      lane.row(in.row + i) += lane.row(operands[2 * i]) * slope;
      return;
    }
    case Kind::kSolve:
      solve(in, i, operands[i], lane);
      return;
    case Kind::kStore:
      if (lane.sample < data.n) {
        data.out[lane.sample * data.program.outputs + operands[2 * i + 1]] = lane.row(operands[2 * i]);
      }
      return;
  }
}

// What is sequential in a stage, for one tile.
template <class T, class Map>
__global__ void __launch_bounds__(kThreads) masked_sequence_kernel(SweepData<T> data, int64_t stage, Map map) {
  const Stage range = data.program.stages[stage];
  const Lane<T> lane(data, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  double* const partial = data.partial + static_cast<int64_t>(blockIdx.x) * kThreads;
  double ladj = stage == 0 ? 0 : partial[threadIdx.x];
  for (int64_t at = range.sequential; at < range.end; ++at) {
    const Instruction in = data.program.instructions[at];
    for (int64_t i = warp; i < in.rows; i += kWarps) execute(in, i, map, lane, &ladj);
    __syncthreads();
  }
  partial[threadIdx.x] = ladj;
  if (data.ladj == nullptr || stage + 1 < data.program.stage_count) return;
  __syncthreads();
  if (warp == 0 && lane.sample < data.n) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w * kWarp + threadIdx.x];
    data.ladj[lane.sample] = static_cast<T>(total);
  }
}

// Blocks that share the panels of the largest product of a stage.
unsigned parts_of(const Program& program, const Stage& stage) {
  int64_t rows = 1;
  for (int64_t i = stage.begin; i < stage.sequential; ++i) rows = std::max(rows, program.instructions[i].rows);
  return static_cast<unsigned>(std::min<int64_t>(64, (rows + kWarps * kPanel - 1) / (kWarps * kPanel)));
}

struct Cuda {
  template <class T, class Map>
  static void sweep(const Program& program, const SweepInputs& inputs, const Map& map, Tensor& out, Tensor* ladj) {
    const Tensor& samples = inputs.samples;
    const int64_t n = samples.size(0), tiles = (n + kWarp - 1) / kWarp;
    if (n == 0) return;
    const int64_t tile_bytes = std::max<int64_t>(1, program.rows) * kWarp * static_cast<int64_t>(sizeof(T));
    const int64_t together = std::min(tiles, std::max<int64_t>(1, kStateBytes / tile_bytes));
    const Tensor state = torch::stable::new_empty(samples, {together * program.rows * kWarp});
    const Tensor partial = torch::stable::new_empty(samples, {together * kThreads}, ScalarType::Double);
    const OnDevice device(samples.get_device_index());

    SweepData<T> data{masked::at_address(static_cast<const int64_t*>(inputs.device_program.data_ptr()), program),
                      static_cast<const T*>(samples.data_ptr()),
                      n,
                      samples.size(1),
                      static_cast<const T*>(inputs.weights.data_ptr()),
                      inputs.constants ? static_cast<const T*>(inputs.constants->data_ptr()) : nullptr,
                      static_cast<T*>(out.mutable_data_ptr()),
                      ladj ? static_cast<T*>(ladj->mutable_data_ptr()) : nullptr,
                      static_cast<T*>(state.mutable_data_ptr()),
                      static_cast<double*>(partial.mutable_data_ptr()),
                      0};
    for (int64_t done = 0; done < tiles; done += together) {
      data.first = done * kWarp;
      const unsigned blocks = static_cast<unsigned>(std::min(together, tiles - done));
      for (int64_t s = 0; s < program.stage_count; ++s) {
        const Stage& stage = program.stages[s];
        const int64_t products = stage.sequential - stage.begin;
        check(products <= 65535, "program has ", products, " products side by side, but expected at most 65535");
        if (products > 0) {
          const dim3 grid(blocks, static_cast<unsigned>(products), parts_of(program, stage));
          launch(masked_products_kernel<T>, grid, dim3(kThreads), 0, device.stream(), data, s);
        }
        launch(masked_sequence_kernel<T, Map>, dim3(blocks), dim3(kThreads), 0, device.stream(), data, s, map);
      }
    }
  }
};

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("masked_affine_inverse", TORCH_BOX(&MaskedOperators<Cuda>::affine_inverse));
  library.impl("masked_spline_inverse", TORCH_BOX(&MaskedOperators<Cuda>::spline_inverse));
  library.impl("masked_backward", TORCH_BOX(&MaskedOperators<Cuda>::backward));
}

}  // namespace
}  // namespace pygen
