// Affine coupling on the CPU: rows in blocks that stay in the first-level cache, short rows several to a block, and
// long rows in fixed chunks whose partial log-determinants are added in order, so that threads never change a result.
#include "coupling.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "coupling_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

// Elements of a row that one work item takes. Fixed, because it decides the order of the sum.
constexpr int64_t kChunk = 16 * kBlock;
// Rows up to this width share a block: by themselves they would be all overhead.
constexpr int64_t kShort = 32;

template <class T>
struct AffineOptions {
  T limit, offset, epsilon;
};

// One block: y[i] = x[i] s + t[i] (or its inverse), and the sum of log s.
template <Activation A, bool kEpsilon, bool kInverse, class T>
PYGEN_CLONES double affine_rows(const T* __restrict x, const T* __restrict raw_scale, const T* __restrict shift,
                                T* __restrict y, int64_t n, AffineOptions<T> options) {
  double sum = 0;  // two conversions and two additions a vector: nothing beside the exponential
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    // Plain numbers: a struct that is assigned to keeps the loop from vectorising.
    const Scale<T> scale = affine_scale<A>(raw_scale[i] + options.offset, options.limit);
    const T value = kEpsilon ? scale.value + options.epsilon : scale.value;
    y[i] = kInverse ? (x[i] - shift[i]) / value : x[i] * value + shift[i];
    sum += kEpsilon ? scalar::log(value) : scale.log;
  }
  return sum;
}

// One block of short rows: y as above, and log s of each element.
template <Activation A, bool kEpsilon, bool kInverse, class T>
PYGEN_CLONES void affine_short_rows(const T* __restrict x, const T* __restrict raw_scale, const T* __restrict shift,
                                    T* __restrict y, T* __restrict log_scales, int64_t n, AffineOptions<T> options) {
  for (int64_t i = 0; i < n; ++i) {
    const Scale<T> scale = affine_scale<A>(raw_scale[i] + options.offset, options.limit);
    const T value = kEpsilon ? scale.value + options.epsilon : scale.value;
    y[i] = kInverse ? (x[i] - shift[i]) / value : x[i] * value + shift[i];
    log_scales[i] = kEpsilon ? scalar::log(value) : scale.log;
  }
}

template <bool kInverse, class T>
PYGEN_CLONES void additive_rows(const T* __restrict x, const T* __restrict shift, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = kInverse ? x[i] - shift[i] : x[i] + shift[i];
}

template <Activation A, bool kInverse, class T>
PYGEN_CLONES void affine_backward_rows(const T* __restrict x, const T* __restrict raw_scale,
                                       const T* __restrict grad_output, const T* __restrict grad_ladj,
                                       T* __restrict grad_input, T* __restrict grad_raw_scale, int64_t n,
                                       AffineOptions<T> options) {
  for (int64_t i = 0; i < n; ++i) {
    const ScaleSlope<T> scale = affine_scale_slope<A>(raw_scale[i] + options.offset, options.limit, options.epsilon);
    const AffineGradient<T> gradient = affine_gradient<kInverse>(x[i], scale, grad_output[i], grad_ladj[i]);
    grad_input[i] = gradient.input;
    grad_raw_scale[i] = gradient.raw_scale;
  }
}

// The value of each element's row, for elements start .. start + n.
template <class T>
void spread(const Rows& rows, int64_t width, int64_t start, int64_t n, T* values) {
  T value;
  for (int64_t i = 0; i < n;) {
    const int64_t row = (start + i) / width, until = std::min(n, (row + 1) * width - start);
    std::fill(values + i, values + until, *read_block(rows, 0, row, 1, &value));
    i = until;
  }
}

template <class T>
using AffineRows = double (*)(const T*, const T*, const T*, T*, int64_t, AffineOptions<T>);

template <class T>
using AffineShortRows = void (*)(const T*, const T*, const T*, T*, T*, int64_t, AffineOptions<T>);

// A block of zeros stands for an absent shift: it is read from the first-level cache, and the loops stay one.
template <class T>
constexpr std::array<T, kBlock> kZeros{};

template <bool kInverse, class T>
void affine_compute(const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift, int64_t activation,
                    AffineOptions<T> options, int64_t event_dims, Tensor& y, Tensor& ladj) {
  const Rows in(x, event_dims);
  const Rows raw = raw_scale ? Rows(*raw_scale, event_dims) : Rows();
  const Rows add = shift ? Rows(*shift, event_dims) : Rows();
  void* const out = y.mutable_data_ptr();
  const ScalarType out_dtype = y.scalar_type();
  T* const sums = static_cast<T*>(ladj.mutable_data_ptr());

  AffineRows<T> block = nullptr;
  AffineShortRows<T> short_block = nullptr;
  for_activation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const bool epsilon = options.epsilon != 0;
    block = epsilon ? &affine_rows<kActivation, true, kInverse, T> : &affine_rows<kActivation, false, kInverse, T>;
    short_block = epsilon ? &affine_short_rows<kActivation, true, kInverse, T>
                          : &affine_short_rows<kActivation, false, kInverse, T>;
  });

  if (raw_scale && in.width > 0 && in.width <= kShort) {
    const Rows all(x, x.dim()), all_raw(*raw_scale, x.dim()), all_add = shift ? Rows(*shift, x.dim()) : Rows();
    const int64_t together = kBlock / in.width;
    parallel((in.rows + together - 1) / together, kBlock, [&](int64_t begin, int64_t end) {
      T x_block[kBlock], raw_block[kBlock], shift_block[kBlock], y_block[kBlock], logs[kBlock];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * together, last = std::min(in.rows, first + together);
        const int64_t start = first * in.width, n = last * in.width - start;
        const T* values = read_block(all, 0, start, n, x_block);
        const T* raws = read_block(all_raw, 0, start, n, raw_block);
        const T* shifts = shift ? read_block(all_add, 0, start, n, shift_block) : kZeros<T>.data();
        T* target = block_target(out, out_dtype, start, y_block);
        short_block(values, raws, shifts, target, logs, n, options);
        write_block(out, out_dtype, start, n, target);
        for (int64_t row = first; row < last; ++row) {
          const T* const log_row = logs + (row - first) * in.width;
          const double sum = std::accumulate(log_row, log_row + in.width, 0.0);
          sums[row] = static_cast<T>(kInverse ? -sum : sum);
        }
      }
    });
    return;
  }

  auto take = [&](int64_t row, int64_t from, int64_t to) {
    double sum = 0;
    T x_block[kBlock], raw_block[kBlock], shift_block[kBlock], y_block[kBlock];
    for (int64_t start = from; start < to; start += kBlock) {
      const int64_t n = std::min(kBlock, to - start);
      const T* values = read_block(in, row, start, n, x_block);
      const T* shifts = shift ? read_block(add, row, start, n, shift_block) : kZeros<T>.data();
      T* target = block_target(out, out_dtype, row * in.width + start, y_block);
      if (raw_scale) {
        const T* raws = read_block(raw, row, start, n, raw_block);
        sum += block(values, raws, shifts, target, n, options);
      } else {
        additive_rows<kInverse>(values, shifts, target, n);
      }
      write_block(out, out_dtype, row * in.width + start, n, target);
    }
    return kInverse ? -sum : sum;
  };

  const int64_t chunks = std::max<int64_t>(1, (in.width + kChunk - 1) / kChunk);
  if (chunks == 1) {
    parallel(in.rows, in.width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) sums[row] = static_cast<T>(take(row, 0, in.width));
    });
    return;
  }
  std::vector<double> partial(static_cast<size_t>(in.rows * chunks));
  parallel(in.rows * chunks, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t from = item % chunks * kChunk;
      partial[static_cast<size_t>(item)] = take(item / chunks, from, std::min(in.width, from + kChunk));
    }
  });
  for (int64_t row = 0; row < in.rows; ++row) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[static_cast<size_t>(row * chunks + chunk)];
    sums[row] = static_cast<T>(sum);
  }
}

template <bool kInverse>
std::tuple<Tensor, Tensor> affine(const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                  int64_t activation, double limit, double offset, double epsilon, int64_t event_dims) {
  check_affine(x, raw_scale, shift, activation, event_dims);
  Tensor y = empty_like_shape(x, x.scalar_type());
  Tensor ladj = empty_ladj(x, event_dims);
  if (x.scalar_type() == ScalarType::Double) {
    affine_compute<kInverse, double>(x, raw_scale, shift, activation, {limit, offset, epsilon}, event_dims, y, ladj);
  } else {
    const AffineOptions<float> options{static_cast<float>(limit), static_cast<float>(offset),
                                       static_cast<float>(epsilon)};
    affine_compute<kInverse, float>(x, raw_scale, shift, activation, options, event_dims, y, ladj);
  }
  return {y, ladj};
}

std::tuple<Tensor, Tensor> affine_forward(const Tensor& x, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                          int64_t activation, double limit, double offset, double epsilon,
                                          int64_t event_dims) {
  return affine<false>(x, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

std::tuple<Tensor, Tensor> affine_inverse(const Tensor& y, const OptionalTensor& raw_scale, const OptionalTensor& shift,
                                          int64_t activation, double limit, double offset, double epsilon,
                                          int64_t event_dims) {
  return affine<true>(y, raw_scale, shift, activation, limit, offset, epsilon, event_dims);
}

template <bool kInverse, class T>
void affine_backward_compute(const Tensor& x, const Tensor& raw_scale, const Tensor& grad_output,
                             const Tensor& grad_ladj, int64_t activation, AffineOptions<T> options, int64_t event_dims,
                             Tensor& grad_input, Tensor& grad_raw_scale) {
  const Rows sums(grad_ladj, grad_ladj.dim());
  const int64_t width = x.numel() / std::max<int64_t>(1, grad_ladj.numel());
  // Short rows are one long one, with the gradient of its row's sum beside each element; a chunk is then one block.
  const int64_t events = width <= kShort ? x.dim() : event_dims, chunk = width <= kShort ? kBlock : kChunk;
  const Rows in(x, events), raw(raw_scale, events), grad(grad_output, events);
  void* const to_input = grad_input.mutable_data_ptr();
  void* const to_raw = grad_raw_scale.mutable_data_ptr();
  const ScalarType input_dtype = grad_input.scalar_type(), raw_dtype = grad_raw_scale.scalar_type();

  void (*block)(const T*, const T*, const T*, const T*, T*, T*, int64_t, AffineOptions<T>) = nullptr;
  for_activation(activation, [&](auto tag) { block = &affine_backward_rows<decltype(tag)::value, kInverse, T>; });

  const int64_t chunks = std::max<int64_t>(1, (in.width + chunk - 1) / chunk);
  parallel(in.rows * chunks, 2 * std::min(in.width, chunk) + 1, [&](int64_t begin, int64_t end) {
    T x_block[kBlock], raw_block[kBlock], grad_block[kBlock], ladj_block[kBlock], input_block[kBlock],
        grad_raw_block[kBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / chunks, from = item % chunks * chunk, to = std::min(in.width, from + chunk);
      spread(sums, width, row * in.width + from, std::min(kBlock, to - from), ladj_block);
      for (int64_t start = from; start < to; start += kBlock) {
        const int64_t n = std::min(kBlock, to - start), at = row * in.width + start;
        const T* values = read_block(in, row, start, n, x_block);
        const T* raws = read_block(raw, row, start, n, raw_block);
        const T* grads = read_block(grad, row, start, n, grad_block);
        T* inputs = block_target(to_input, input_dtype, at, input_block);
        T* grad_raws = block_target(to_raw, raw_dtype, at, grad_raw_block);
        block(values, raws, grads, ladj_block, inputs, grad_raws, n, options);
        write_block(to_input, input_dtype, at, n, inputs);
        write_block(to_raw, raw_dtype, at, n, grad_raws);
      }
    }
  });
}

std::tuple<Tensor, Tensor> affine_backward(const Tensor& x, const Tensor& raw_scale, const Tensor& grad_output,
                                           const Tensor& grad_ladj, int64_t activation, double limit, double offset,
                                           double epsilon, int64_t event_dims, bool inverse) {
  check_affine(x, raw_scale, grad_output, activation, event_dims);
  check_grad_ladj(x, grad_ladj, event_dims);
  Tensor grad_input = empty_like_shape(x, x.scalar_type());
  Tensor grad_raw_scale = empty_like_shape(x, raw_scale.scalar_type());
  auto run = [&](auto options) {
    auto compute = inverse ? &affine_backward_compute<true, decltype(options.limit)>
                           : &affine_backward_compute<false, decltype(options.limit)>;
    compute(x, raw_scale, grad_output, grad_ladj, activation, options, event_dims, grad_input, grad_raw_scale);
  };
  if (x.scalar_type() == ScalarType::Double) {
    run(AffineOptions<double>{limit, offset, epsilon});
  } else {
    run(AffineOptions<float>{static_cast<float>(limit), static_cast<float>(offset), static_cast<float>(epsilon)});
  }
  return {grad_input, grad_raw_scale};
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("affine_forward", TORCH_BOX(&affine_forward));
  library.impl("affine_inverse", TORCH_BOX(&affine_inverse));
  library.impl("affine_backward", TORCH_BOX(&affine_backward));
}

}  // namespace
}  // namespace pygen
