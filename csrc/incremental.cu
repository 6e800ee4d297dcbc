// The incremental programs on CUDA: one launch runs all steps, a block for a few samples, with a barrier after each
// task. A warp takes 32 output channels and a slice of the inputs; slices are added in their order, which the program
// alone decides, so that a sample's bits do not depend on its batch. Weights stay in shared memory where they fit, and
// in the second-level cache where not.
#include "incremental.h"

#include "incremental_block.h"
#include "incremental_checks.h"
#include "simt.h"
#include "tensor.h"

namespace pygen {
namespace {

using incremental::Advancing;
using incremental::Header;
using incremental::Instruction;
using incremental::kPanel;
using incremental::Operation;
using incremental::padded;
using incremental::Program;
using incremental::Source;
using incremental::Space;

constexpr int kWarp = 32;
constexpr int kMostThreads = 512, kFewestThreads = 128;
constexpr int kColumns = 4;                 // sites, or samples, that share a weight
constexpr int64_t kMostSamples = 4;         // of a block
constexpr int64_t kFullDevice = 128;        // blocks that keep every multiprocessor busy
constexpr size_t kSharedBytes = 80 * 1024;  // what weights and workspace may take beside the sampler's scratch

// Sums of products round once a step, as in every library's convolutions; all else is compiled without contraction, so
// that tokens are those of the sampler.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// One block's way through the steps.
template <class T>
class Walker {
 public:
  __device__ __forceinline__ Walker(const Advancing<T>& all, T* shared, sampling::Scratch<T>* scratch)
      : all_(all),
        program_(all.program),
        header_(all.program.header),
        first_(static_cast<int64_t>(blockIdx.x) * all.samples),
        count_(static_cast<int>(min(all.samples, all.n - first_))),
        weights_(all.weights),
        workspace_(shared),
        drawer_(all, shared, scratch) {
    if (!all.staged) return;
    T* const staged = shared + workspace_size(static_cast<int>(blockDim.x));
    for (int64_t i = threadIdx.x; i < header_.weights; i += blockDim.x) staged[i] = all.weights[i];
    weights_ = staged;
    __syncthreads();
  }

  // Numbers of shared memory for the sums of slices, one a thread and column, and later for the draw of a pixel.
  static __host__ __device__ __forceinline__ int64_t workspace_size(int threads) {
    constexpr int kDraw = incremental::BlockDrawer<T>::kWorkspace;
    return kColumns * threads > kDraw ? kColumns * threads : kDraw;
  }

  __device__ __forceinline__ void run() {
    for (int64_t step = all_.begin; step < all_.end; ++step) {
      if (step > 0) write_element(step - 1);
      __syncthreads();
      const int32_t index = program_.steps[step];
      for (int32_t t = program_.templates[index]; t < program_.templates[index + 1]; ++t) {
        const incremental::Task task = program_.tasks[t];
        const Operation in = program_.operations[task.operation];
        const incremental::Shape grid = program_.grids[in.grid];
        execute(in, row_at(header_, grid, step) + task.row, column_at(header_, grid, step) + task.column, task.count);
        __syncthreads();
      }
      draw_element(step);
      __syncthreads();
    }
  }

 private:
  // A column of a task: one site of one sample.
  struct Column {
    int sample;
    int64_t x;
  };
  __device__ __forceinline__ Column column(int64_t x, int64_t number) const {
    return {static_cast<int>(number % count_), x + number / count_};
  }

  __device__ __forceinline__ T* state(int sample) const { return all_.state + (first_ + sample) * header_.state; }

  __device__ __forceinline__ const T* space(Space space, int sample) const {
    switch (space) {
      case Space::kState:
        return state(sample);
      case Space::kWeights:
        return weights_;
      default:
        return all_.conditions + (first_ + sample) * header_.conditions;
    }
  }

  __device__ __forceinline__ T* target(const Operation& in, int64_t y, Column at) const {
    return state(at.sample) + incremental::address(program_, program_.sources[in.out], y, at.x);
  }

  // Channel i of a source at an address, zero where that is nowhere.
  __device__ __forceinline__ T channel(const Source& source, int64_t address, int sample, int64_t i) const {
    if (address < 0) return T(0);
    return space(source.space,
                 sample)[address + (source.gather == incremental::kNoTable ? i : program_.tables[source.gather + i])];
  }

  __device__ __forceinline__ void execute(const Operation& in, int64_t y, int64_t x, int64_t sites) {
    const int64_t columns = sites * count_;
    switch (in.kind) {
      case incremental::Kind::kLinear:
        for (int64_t from = 0; from < columns; from += kColumns) {
          if (from > 0) __syncthreads();  // the sums before are still read
          multiply(in, y, x, from, static_cast<int>(min(int64_t{kColumns}, columns - from)));
        }
        return;
      case incremental::Kind::kPointwise:
        return pointwise(in, y, x, columns);
      case incremental::Kind::kNorm:
        return normalize(in, y, x, columns);
      case incremental::Kind::kLookup:
        return look_up(in, y, x, columns);
      case incremental::Kind::kAttention:
        return attend(in, y, x, columns);
    }
  }

  // The products of a slice of inputs with 32 outputs, for a few columns.
  __device__ __forceinline__ void multiply_slice(const Operation& in, int64_t y, const Column* at, int output,
                                                 int64_t begin, int64_t end, int64_t inputs, T* sums) const {
    const int64_t outputs = padded(in.channels), panel = output / kPanel * kPanel;
    const int64_t width = min(kPanel, outputs - panel);
    const bool there = output < outputs;
    const T* const weights = weights_ + in.weights + outputs + panel * inputs + (there ? output - panel : 0);
    const T* const zero = weights_ + header_.weights - 1;  // the last weight is a zero
    int64_t done = 0;
    for (int32_t s = 0; s < in.sources && done < end; ++s) {
      const Source source = program_.sources[in.first_source + s];
      const int64_t from = max(begin, done), to = min(end, done + source.count);
      if (from < to) {
        const T* values[kColumns];
        int64_t strides[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t address = incremental::address(program_, source, y, at[c].x);
          strides[c] = address < 0 ? 0 : 1;
          values[c] = address < 0 ? zero : space(source.space, at[c].sample) + address + (from - done);
        }
#pragma unroll 4
        for (int64_t k = from; k < to; ++k) {
          const T weight = weights[k * width];
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            sums[c] = multiply_add(weight, values[c][(k - from) * strides[c]], sums[c]);
        }
      }
      done += source.count;
    }
  }

  __device__ __forceinline__ void multiply(const Operation& in, int64_t y, int64_t x, int64_t first, int columns) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int outputs = static_cast<int>(padded(in.channels)), units = (outputs + kWarp - 1) / kWarp;
    const int slices = max(1, warps / units);  // several only where each warp has one job at most
    const T* const bias = weights_ + in.weights;
    int64_t inputs = 0;
    for (int32_t s = 0; s < in.sources; ++s) inputs += program_.sources[in.first_source + s].count;
    Column at[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) at[c] = column(x, first + min(c, columns - 1));
    for (int job = warp; job < units * slices; job += warps) {
      const int slice = job / units, output = job % units * kWarp + lane;
      T sums[kColumns] = {};
      multiply_slice(in, y, at, output, inputs * slice / slices, inputs * (slice + 1) / slices, inputs, sums);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (slices > 1) {
          workspace_[(c * slices + slice) * units * kWarp + output] = sums[c];
        } else if (c < columns && output < outputs) {
          target(in, y, at[c])[output] = bias[output] + sums[c];
        }
      }
    }
    if (slices == 1) return;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < outputs * columns; i += static_cast<int>(blockDim.x)) {
      const int c = i / outputs, output = i % outputs;
      T sum = bias[output];
      for (int slice = 0; slice < slices; ++slice) sum += workspace_[(c * slices + slice) * units * kWarp + output];
      target(in, y, column(x, first + c))[output] = sum;
    }
  }

  __device__ __forceinline__ void pointwise(const Operation& in, int64_t y, int64_t x, int64_t columns) const {
    const int64_t width = padded(in.channels);
    for (int64_t i = threadIdx.x; i < columns * width; i += blockDim.x) {
      const Column at = column(x, i / width);
      const int64_t channel_number = i % width;
      T* const to = target(in, y, at) + channel_number;
      if (channel_number >= in.channels) {
        *to = T(0);
        continue;
      }
      T registers[incremental::kMostRegisters];
      for (int32_t s = 0; s < in.sources; ++s) {
        const Source source = program_.sources[in.first_source + s];
        registers[s] = channel(source, incremental::address(program_, source, y, at.x), at.sample, channel_number);
      }
      for (int32_t k = 0; k < in.instructions; ++k) {
        const Instruction each = program_.instructions[in.first_instruction + k];
        registers[in.sources + k] = incremental::apply_any(each.function, registers[each.a], registers[each.b],
                                                           weights_[each.numbers], weights_[each.numbers + 1]);
      }
      *to = registers[in.sources + in.instructions - 1];
    }
  }

  // Calls f(channel, value) for the lane's channels of all sources at a site.
  template <class F>
  __device__ __forceinline__ void for_channels(const Operation& in, int64_t y, Column at, const F& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int64_t done = 0;
    for (int32_t s = 0; s < in.sources; ++s) {
      const Source source = program_.sources[in.first_source + s];
      const int64_t address = incremental::address(program_, source, y, at.x);
      for (int64_t i = lane; i < source.count; i += kWarp) f(done + i, channel(source, address, at.sample, i));
      done += source.count;
    }
  }

  __device__ __forceinline__ void normalize(const Operation& in, int64_t y, int64_t x, int64_t columns) const {
    const int64_t width = padded(in.channels);
    const T* const weight = weights_ + in.weights;
    const T count = static_cast<T>(in.channels);
    for (int64_t i = threadIdx.x / kWarp; i < columns; i += blockDim.x / kWarp) {
      const Column at = column(x, i);
      T own = 0;
      for_channels(in, y, at, [&](int64_t, T value) { own += value; });
      const T mean = warp_sum(own) / count;
      own = 0;
      for_channels(in, y, at, [&](int64_t, T value) { own += (value - mean) * (value - mean); });
      const T scale = T(1) / std::sqrt(warp_sum(own) / count + weight[2 * width]);
      T* const to = target(in, y, at);
      for_channels(in, y, at,
                   [&](int64_t k, T value) { to[k] = (value - mean) * scale * weight[k] + weight[width + k]; });
    }
  }

  __device__ __forceinline__ void look_up(const Operation& in, int64_t y, int64_t x, int64_t columns) const {
    const Source source = program_.sources[in.first_source];
    const int64_t width = padded(in.channels);
    for (int64_t i = threadIdx.x; i < columns * width; i += blockDim.x) {
      const Column at = column(x, i / width);
      const T value = channel(source, incremental::address(program_, source, y, at.x), at.sample, 0);
      const bool valid = value >= T(0) && value < static_cast<T>(in.heads);
      target(in, y, at)[i % width] = valid ? weights_[in.weights + static_cast<int64_t>(value) * width + i % width]
                                           : std::numeric_limits<T>::quiet_NaN();
    }
  }

  // A warp for each head of a column: scores of keys by its lanes, then outputs by its lanes.
  __device__ __forceinline__ void attend(const Operation& in, int64_t y, int64_t x, int64_t columns) const {
    const Source query = program_.sources[in.first_source], key = program_.sources[in.first_source + 1],
                 value = program_.sources[in.first_source + 2];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t size = query.count / in.heads, width = in.channels / in.heads;
    const T scale = weights_[in.weights];
    T* const scores =
        all_.scores + (static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp) * all_.keys;
    for (int64_t i = threadIdx.x / kWarp; i < columns * in.heads; i += blockDim.x / kWarp) {
      const int64_t head = i % in.heads;
      const Column at = column(x, i / in.heads);
      const int64_t site = y * program_.grids[in.grid].width + at.x;
      const int64_t first = program_.tables[in.first_key + site], last = program_.tables[in.last_key + site];
      const int64_t from = incremental::address(program_, query, y, at.x);
      T peak = -std::numeric_limits<T>::infinity();
      for (int64_t k = first + lane; k < last; k += kWarp) {
        const int64_t row = incremental::address(program_, key, k / key.width, k % key.width);
        T score = 0;
        for (int64_t d = head * size; d < (head + 1) * size; ++d) {
          score += channel(query, from, at.sample, d) * channel(key, row, at.sample, d);
        }
        scores[k] = score *= scale;
        peak = score > peak || score != score ? score : peak;
      }
      peak = warp_max(peak);
      T total = 0;
      for (int64_t k = first + lane; k < last; k += kWarp) total += scores[k] = scalar::exp(scores[k] - peak);
      total = warp_sum(total);
      __syncwarp();
      T* const to = target(in, y, at) + head * width;
      for (int64_t d = lane; d < width; d += kWarp) {
        T sum = 0;
        for (int64_t k = first; k < last; ++k) {
          const int64_t row = incremental::address(program_, value, k / value.width, k % value.width);
          sum += scores[k] / total * channel(value, row, at.sample, head * width + d);
        }
        to[d] = sum;
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ int64_t address_of_element(int32_t source, int64_t step) const {
    const incremental::Shape grid{header_.height, header_.width};
    return incremental::address(program_, program_.sources[source], row_at(header_, grid, step),
                                column_at(header_, grid, step));
  }

  // Element `step` of the sample becomes the value of its token; NaN for a token that is none.
  __device__ __forceinline__ void write_element(int64_t step) const {
    const int32_t write = program_.writes[step % header_.channels];
    const int sample = static_cast<int>(threadIdx.x);
    if (write < 0 || sample >= count_) return;
    const int64_t token = all_.tokens[(first_ + sample) * header_.steps + step];
    const bool valid = token >= 0 && token < all_.levels;
    state(sample)[address_of_element(write, step)] = valid ? all_.values[token] : std::numeric_limits<T>::quiet_NaN();
  }

  __device__ __forceinline__ void draw_element(int64_t step) {
    if (all_.mode == Advance::kFollow && !all_.logits) return;
    const int64_t channel_number = step % header_.channels, vocabulary = header_.vocabulary;
    const int32_t draw = program_.draws[channel_number];
    const Source source = program_.sources[draw];
    const int64_t address = address_of_element(draw, step);
    for (int sample = 0; sample < count_; ++sample) {
      const int64_t row = first_ + sample, index = row * (all_.end - all_.begin) + step - all_.begin;
      T* const numbers = all_.rows + row * vocabulary;
      for (int64_t i = threadIdx.x; i < vocabulary; i += blockDim.x) {
        numbers[i] = channel(source, address, sample, i);
        if (all_.logits) all_.logits[index * vocabulary + i] = numbers[i];
      }
      __syncthreads();
      drawer_.draw_or_score(row, step, all_.log_prob + index);
      __syncthreads();
    }
  }

  const Advancing<T>& all_;
  const Program& program_;
  const Header& header_;
  int64_t first_;
  int count_;
  const T* weights_;
  T* workspace_;
  incremental::BlockDrawer<T> drawer_;
};

template <class T>
__global__ void __launch_bounds__(kMostThreads) advance_kernel(Advancing<T> all) {
  SHARED(sampling::Scratch<T>, scratch, [1]);
  Walker<T>(all, dynamic_shared<T>(), scratch).run();
}

struct Cuda {
  template <class T>
  static void advance(const Program& program, const AdvanceInputs& inputs, Tensor& log_prob, Tensor* logits) {
    const Header& header = program.header;
    const Tensor& state = inputs.state;
    const int64_t n = state.size(0),
                  samples = std::clamp<int64_t>((n + kFullDevice - 1) / kFullDevice, 1, kMostSamples);
    const int64_t blocks = (n + samples - 1) / samples;
    check(blocks <= 0x7fffffff, "state has too many rows for one launch: ", n);
    int threads = kFewestThreads;
    while (threads < kMostThreads && threads < 2 * header.widest) threads *= 2;
    int64_t keys = 0;
    for (int32_t i = 0; i < header.operations; ++i) {
      const Operation& in = program.operations[i];
      if (in.kind != incremental::Kind::kAttention) continue;
      const Source& key = program.sources[in.first_source + 1];
      keys = std::max(keys, int64_t{key.height} * key.width);
    }
    const Tensor rows = torch::stable::new_empty(state, {n, header.vocabulary});
    const Tensor scores = torch::stable::new_empty(state, {blocks * (threads / kWarp) * keys});
    const size_t workspace = static_cast<size_t>(Walker<T>::workspace_size(threads)) * sizeof(T);
    const size_t whole = workspace + static_cast<size_t>(header.weights) * sizeof(T);
    const OnDevice device(state.get_device_index());

    Advancing<T> all{};
    all.program = incremental::program_at(static_cast<const int32_t*>(inputs.device_program.data_ptr()), header);
    all.n = n;
    all.samples = samples;
    all.begin = inputs.begin;
    all.end = inputs.end;
    all.state = static_cast<T*>(state.data_ptr());
    all.tokens = static_cast<int64_t*>(inputs.tokens.data_ptr());
    all.weights = static_cast<const T*>(inputs.weights.data_ptr());
    all.conditions = static_cast<const T*>(inputs.conditions.data_ptr());
    all.values = static_cast<const T*>(inputs.values.data_ptr());
    all.levels = inputs.values.size(0);
    all.known = inputs.known ? static_cast<const bool*>(inputs.known->data_ptr()) : nullptr;
    all.sample_ids = static_cast<const int64_t*>(inputs.sample_ids.data_ptr());
    all.id_stride = inputs.sample_ids.stride(0);
    all.seeds = inputs.seeds;
    all.mode = inputs.mode;
    all.logistics = inputs.logistics;
    all.row =
        sampling::row_arguments<T, T>({static_cast<const T*>(rows.data_ptr()), header.vocabulary, 1, header.vocabulary},
                                      header.vocabulary, inputs.filters);
    all.log_prob = static_cast<T*>(log_prob.data_ptr());
    all.logits = logits ? static_cast<T*>(logits->data_ptr()) : nullptr;
    all.rows = static_cast<T*>(rows.data_ptr());
    all.scores = static_cast<T*>(scores.data_ptr());
    all.keys = keys;
    all.staged = whole <= kSharedBytes;
    launch(advance_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
           all.staged ? whole : workspace, device.stream(), all);
  }
};

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("incremental_advance", TORCH_BOX(&incremental_advance<Cuda>));
}

}  // namespace
}  // namespace pygen
