// The masked sweeps on the CPU: each tile of samples runs the whole program, with its rows in the second-level cache
// and the weights streaming past; threads take tiles.
#include "masked.h"

#include <cstdlib>
#include <memory>

#include "masked_operators.h"
#include "masked_rows.h"
#include "tensor.h"

namespace pygen {
namespace {

using masked::Instruction;
using masked::Kind;
using masked::kLanes;
using masked::Program;

template <class T>
struct SweepData {
  Program program;
  const T* samples;  // (n, columns)
  int64_t n, columns;
  const T* weights;
  const T* constants;
  T* out;   // (n, outputs)
  T* ladj;  // (n,), or nullptr
};

template <class T>
SweepData<T> sweep_data(const Program& program, const SweepInputs& inputs, Tensor& out, Tensor* ladj) {
  return {program,
          static_cast<const T*>(inputs.samples.data_ptr()),
          inputs.samples.size(0),
          inputs.samples.size(1),
          static_cast<const T*>(inputs.weights.data_ptr()),
          inputs.constants ? static_cast<const T*>(inputs.constants->data_ptr()) : nullptr,
          static_cast<T*>(out.mutable_data_ptr()),
          ladj ? static_cast<T*>(ladj->mutable_data_ptr()) : nullptr};
}

// x and log |dx/dy| of a row of inputs, from the rows of their parameters, which may be overwritten.
template <Activation A, bool kEpsilon, int L, class T>
PYGEN_CLONES void affine_inverse_row(const T* __restrict y, const T* __restrict raw, const T* __restrict shift, T limit,
                                     T offset, T epsilon, T* __restrict x, double* __restrict ladj) {
#pragma omp simd
  for (int l = 0; l < L; ++l) {
    // Plain numbers: a struct that is assigned to keeps the loop from vectorising.
    const Scale<T> scale = affine_scale<A>(raw[l] + offset, limit);
    const T value = kEpsilon ? scale.value + epsilon : scale.value;
    x[l] = (y[l] - shift[l]) / value;
    ladj[l] -= kEpsilon ? scalar::log(value) : scale.log;
  }
}

template <int L, class T>
void map_row(const AffineMap<T>& map, int64_t, const T* y, T* parameters, T* x, double* ladj) {
  for_activation(map.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const auto run = map.epsilon != T(0) ? &affine_inverse_row<kActivation, true, L, T>
                                         : &affine_inverse_row<kActivation, false, L, T>;
    run(y, parameters, parameters + L, map.limit, map.offset, map.epsilon, x, ladj);
  });
}

template <Parametrization P, int L, class T>
PYGEN_CLONES void spline_inverse_row(const T* y, T* parameters, const SplineBounds<L, T>& bounds,
                                     const SplineOptions<T>& options, T* x, double* ladj) {
  T logs[L];
  spline<P, true, L>(y, parameters, bounds, options, x, logs);
  for (int l = 0; l < L; ++l) ladj[l] += logs[l];
}

template <int L, class T>
void map_row(const SplineMap<T>& map, int64_t input, const T* y, T* parameters, T* x, double* ladj) {
  SplineBounds<L, T> bounds;
  T* const rows[5] = {bounds.left, bounds.right, bounds.bottom, bounds.top, bounds.tails};
  for (int i = 0; i < 5; ++i) std::fill_n(rows[i], L, map.bound(i, input));
  for_parametrization(map.parametrization, [&](auto tag) {
    spline_inverse_row<decltype(tag)::value, L>(y, parameters, bounds, map.options, x, ladj);
  });
}

template <int L, class T>
void map_row(const NoMap&, int64_t, const T*, T*, T*, double*) {}

// One tile: V vectors of samples from `first` on. The lanes past the last sample compute on zeros.
template <int V, class T, class Map>
class Tile {
 public:
  static constexpr int kWidth = kLanes<T, V>;

  Tile(const SweepData<T>& data, const Map& map, T* state, int64_t first)
      : data_(data), map_(map), state_(state), first_(first) {
    count_ = std::min<int64_t>(kWidth, data.n - first);
  }

  void run() {
    const Program& program = data_.program;
    for (int64_t s = 0; s < program.stage_count; ++s) {
      for (int64_t i = program.stages[s].begin; i < program.stages[s].end; ++i) execute(program.instructions[i]);
    }
    if (data_.ladj) {
      for (int64_t l = 0; l < count_; ++l) data_.ladj[first_ + l] = static_cast<T>(ladj_[l]);
    }
  }

 private:
  T* row(int64_t index) const { return state_ + index * kWidth; }

  const T* column(int64_t index, T* buffer) const {
    const T* from = data_.samples + first_ * data_.columns + index;
    for (int64_t l = 0; l < kWidth; ++l) buffer[l] = l < count_ ? from[l * data_.columns] : T(0);
    return buffer;
  }

  // A row, or ~column of the samples.
  const T* value(int64_t operand, T* buffer) const { return operand >= 0 ? row(operand) : column(~operand, buffer); }

  void execute(const Instruction& in) {
    const int64_t* operands = data_.program.operands + in.a;
    switch (in.kind) {
      case Kind::kLinear:
        return linear(in);
      case Kind::kActivation:
        return masked::for_unit(in.b, [&](auto tag) {
          for (int64_t i = 0; i < in.rows; ++i) {
            const T* h = value(operands[i], first_buffer_);
            masked::activate_row<decltype(tag)::value, kWidth>(h, data_.constants[in.c], row(in.row + i));
          }
        });
      case Kind::kAdd:
      case Kind::kMultiply: {
        const auto combine = in.kind == Kind::kAdd ? &masked::add_row<kWidth, T> : &masked::multiply_row<kWidth, T>;
        for (int64_t i = 0; i < in.rows; ++i) {
          combine(value(operands[2 * i], first_buffer_), value(operands[2 * i + 1], second_buffer_), row(in.row + i));
        }
        return;
      }
      case Kind::kScale:
        for (int64_t i = 0; i < in.rows; ++i) {
          const T* pair = data_.constants + in.c + 2 * i;
          masked::scale_row<kWidth>(value(operands[i], first_buffer_), pair[0], pair[1], row(in.row + i));
        }
        return;
      case Kind::kTransform:
        for (int64_t i = 0; i < in.rows; ++i) {
          const T* y = column(operands[i], first_buffer_);
          map_row<kWidth>(map_, operands[i], y, row(in.b + i * in.c), row(in.row + i), ladj_);
        }
        return;
      case Kind::kAccumulate:
        for (int64_t i = 0; i < in.rows; ++i) {
          const T *h = row(operands[2 * i]), slope = operands[2 * i + 1];
          T* const to = row(in.row + i);
          if (slope < 0) {
            masked::add_row<kWidth>(h, to, to);
          } else {
            masked::accumulate_row<kWidth>(h, column(slope, first_buffer_), to);
          }
        }
        return;
      case Kind::kSolve:
        for (int64_t i = 0; i < in.rows; ++i) solve(in, i, operands[i]);
        return;
      case Kind::kStore:
        for (int64_t i = 0; i < in.rows; ++i) store(row(operands[2 * i]), operands[2 * i + 1]);
        return;
    }
  }

  void linear(const Instruction& in) {
    T* const rows = row(in.row);
    if (in.d != masked::kContinue) {
      for (int64_t i = 0; i < in.rows; ++i) {
        std::fill_n(rows + i * kWidth, kWidth, in.d == masked::kZero ? T(0) : data_.constants[in.d + i]);
      }
    }
    masked::multiply<T, V>(data_.weights + in.c, row(in.a), in.b, rows, in.rows);
  }

  void solve(const Instruction& in, int64_t i, int64_t input) {
    const int64_t features = in.d, per_input = in.c;
    T* const x = row(in.row + i);
    masked::add_row<kWidth>(column(input, first_buffer_), x, x);
    for (int64_t k = 0; k < per_input; ++k) {
      T* const parameter = row(in.b + i * per_input + k);
      const int64_t a = features + input * per_input + k;
      const T* b = column(a + features * per_input, second_buffer_);
      std::copy_n(b, kWidth, parameter);
      masked::accumulate_row<kWidth>(x, column(a, first_buffer_), parameter);
    }
  }

  void store(const T* from, int64_t column) const {
    T* to = data_.out + first_ * data_.program.outputs + column;
    for (int64_t l = 0; l < count_; ++l) to[l * data_.program.outputs] = from[l];
  }

  const SweepData<T>& data_;
  const Map& map_;
  T* state_;
  int64_t first_, count_;
  alignas(64) T first_buffer_[kWidth];
  alignas(64) T second_buffer_[kWidth];
  alignas(64) double ladj_[kWidth] = {};
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Cpu {
  template <class T, class Map>
  static void sweep(const Program& program, const SweepInputs& inputs, const Map& map, Tensor& out, Tensor* ladj) {
    constexpr int64_t kWide = kLanes<T, 2>, kNarrow = kLanes<T, 1>;
    const SweepData<T> data = sweep_data<T>(program, inputs, out, ladj);
    const int64_t tiles = (data.n + kWide - 1) / kWide;
    // Each weight is multiplied with two vectors, each row is an operation or two beside that.
    const int64_t cost = (inputs.weights.numel() + 16 * program.rows) / 8;
    parallel(tiles, cost, [&](int64_t begin, int64_t end) {
      const size_t bytes = static_cast<size_t>(std::max<int64_t>(1, program.rows) * kWide) * sizeof(T);
      const std::unique_ptr<void, Free> memory(std::aligned_alloc(64, bytes));
      check(memory != nullptr, "no memory for the ", program.rows, " rows of a tile");
      T* const state = static_cast<T*>(memory.get());
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kWide;
        if (data.n - first > kNarrow) {
          Tile<2, T, Map>(data, map, state, first).run();
        } else {
          Tile<1, T, Map>(data, map, state, first).run();
        }
      }
    });
  }
};

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("masked_affine_inverse", TORCH_BOX(&MaskedOperators<Cpu>::affine_inverse));
  library.impl("masked_spline_inverse", TORCH_BOX(&MaskedOperators<Cpu>::spline_inverse));
  library.impl("masked_backward", TORCH_BOX(&MaskedOperators<Cpu>::backward));
}

}  // namespace
}  // namespace pygen
