// What every operator needs of PyTorch's stable ABI: one-sentence checks, dtype dispatch, reading rows of any stride
// and dtype in blocks, and threads that wake only for work worth their while.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "scalar.h"

namespace pygen {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises one sentence; PyTorch turns it into RuntimeError. STD_TORCH_CHECK would put a source path in front of it.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    std::ostringstream sentence;
    (sentence << ... << parts);
    throw std::runtime_error(sentence.str());
  }
}

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < x.dim(); ++d) text << (d ? ", " : "") << x.size(d);
  text << (x.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes();
  const auto right = b.sizes();
  return left.size() == right.size() && std::equal(left.begin(), left.end(), right.begin());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Calls `f(T{})` with the C++ type of a floating dtype.
template <class F>
inline decltype(auto) for_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      throw std::runtime_error("dtype is not supported: expected float32, float64, bfloat16 or float16");
  }
}

// Arithmetic is done in float, in double for double.
template <class T>
struct arithmetic {
  using type = float;
};
template <>
struct arithmetic<double> {
  using type = double;
};

// The elements of a tensor seen as (rows, width): the last `event_dims` dimensions make a row. Neighbouring dimensions
// that lie evenly in memory are merged, so a contiguous tensor, or half of one, has one dimension per part.
struct Rows {
  static constexpr int kMaxDims = 8;
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t rows = 1, width = 1;
  int row_dims = 0, event_dims = 0;
  int64_t row_sizes[kMaxDims], row_strides[kMaxDims];  // outermost first
  int64_t event_sizes[kMaxDims], event_strides[kMaxDims];

  Rows() = default;
  // `skipped` dimensions at the end are left out, at their index 0.
  Rows(const Tensor& x, int64_t events, int64_t skipped = 0) : data(x.data_ptr()), dtype(x.scalar_type()) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int64_t dims = static_cast<int64_t>(sizes.size()) - skipped, split = dims - events;
    check(split >= 0, "event_dims is ", events, ", but x has only ", dims, " dimensions");
    row_dims = merge(sizes.data(), strides.data(), 0, split, row_sizes, row_strides, &rows);
    event_dims = merge(sizes.data(), strides.data(), split, dims, event_sizes, event_strides, &width);
  }

  bool dense() const { return event_dims == 0 || (event_dims == 1 && event_strides[0] == 1); }

  PYGEN_INLINE int64_t row_offset(int64_t row) const { return offset(row, row_dims, row_sizes, row_strides); }
  PYGEN_INLINE int64_t event_offset(int64_t i) const { return offset(i, event_dims, event_sizes, event_strides); }

 private:
  PYGEN_INLINE static int64_t offset(int64_t index, int dims, const int64_t* sizes, const int64_t* strides) {
    int64_t sum = 0;
    for (int d = dims - 1; d > 0; --d) {
      sum += (index % sizes[d]) * strides[d];
      index /= sizes[d];
    }
    return dims ? sum + index * strides[0] : sum;
  }

  static int merge(const int64_t* sizes, const int64_t* strides, int64_t from, int64_t to, int64_t* out_sizes,
                   int64_t* out_strides, int64_t* count) {
    int dims = 0;
    *count = 1;
    for (int64_t d = from; d < to; ++d) {
      *count *= sizes[d];
      if (sizes[d] == 1) continue;
      if (dims && out_strides[dims - 1] == sizes[d] * strides[d]) {
        out_sizes[dims - 1] *= sizes[d];
        out_strides[dims - 1] = strides[d];
      } else {
        check(dims < kMaxDims, "a tensor has more than ", kMaxDims, " dimensions that cannot be merged");
        out_sizes[dims] = sizes[d];
        out_strides[dims++] = strides[d];
      }
    }
    return dims;
  }
};

// A row in float (or double) blocks: a pointer into the row where it lies dense in that very type, else a copy in
// `buffer`. The loops over elements are then the same for every dtype and stride.
constexpr int64_t kBlock = 1024;

// Dense rows of the 16-bit dtypes, vectorised in conversion.cpp.
void widen_rows(const BFloat16* from, int64_t n, float* to);
void widen_rows(const Half* from, int64_t n, float* to);
void narrow_rows(const float* from, int64_t n, BFloat16* to);
void narrow_rows(const float* from, int64_t n, Half* to);

template <class T>
constexpr bool is_16_bit = std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>;

template <class Compute, class Stored>
inline void copy_strided(const Stored* from, int64_t stride, int64_t n, Compute* to) {
  if (stride == 1) {
    if constexpr (is_16_bit<Stored> && std::is_same_v<Compute, float>) {
      widen_rows(from, n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Compute>(from[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Compute>(from[i * stride]);
  }
}

template <class Compute>
inline const Compute* read_block(const Rows& rows, int64_t row, int64_t start, int64_t n, Compute* buffer) {
  return for_dtype(rows.dtype, [&](auto stored) -> const Compute* {
    using Stored = decltype(stored);
    const Stored* base = static_cast<const Stored*>(rows.data) + rows.row_offset(row);
    if (rows.dense()) {
      if constexpr (std::is_same_v<Stored, Compute>) {
        return base + start;
      } else {
        copy_strided(base + start, int64_t{1}, n, buffer);
        return buffer;
      }
    }
    const int64_t inner = rows.event_sizes[rows.event_dims - 1];
    const int64_t stride = rows.event_strides[rows.event_dims - 1];
    for (int64_t done = 0; done < n;) {
      const int64_t position = start + done;
      const int64_t run = std::min(n - done, inner - position % inner);
      copy_strided(base + rows.event_offset(position), stride, run, buffer + done);
      done += run;
    }
    return buffer;
  });
}

// Writes a block into a dense row of another dtype; a no-op where `values` already lies there.
template <class Compute>
inline void write_block(void* data, ScalarType dtype, int64_t offset, int64_t n, const Compute* values) {
  for_dtype(dtype, [&](auto stored) {
    using Stored = decltype(stored);
    Stored* to = static_cast<Stored*>(data) + offset;
    if (static_cast<const void*>(to) == static_cast<const void*>(values)) return;
    if constexpr (is_16_bit<Stored> && std::is_same_v<Compute, float>) {
      narrow_rows(values, n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Stored>(values[i]);
    }
  });
}

// Where block results go: straight into the output where it has the type of the arithmetic.
template <class Compute>
inline Compute* block_target(void* data, ScalarType dtype, int64_t offset, Compute* buffer) {
  constexpr ScalarType own = std::is_same_v<Compute, double> ? ScalarType::Double : ScalarType::Float;
  return dtype == own ? static_cast<Compute*>(data) + offset : buffer;
}

// The limit that pygen.set_num_threads sets on top of PyTorch's own; 0 for none. Lives in threads.cpp.
int64_t thread_limit();

// Runs f(begin, end) over [0, items): on the calling thread when the whole is worth less than two threads' waking
// (`cost` is about nanoseconds per item), else on PyTorch's threads. How it is split never changes a result.
template <class F>
inline void parallel(int64_t items, int64_t cost, const F& f) {
  constexpr int64_t kWorthAThread = 20'000;
  if (items <= 0) return;
  const int64_t limit = thread_limit();
  if (items == 1 || limit == 1 || items * cost < 2 * kWorthAThread) {
    f(int64_t{0}, items);
    return;
  }
  int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
  if (limit > 0) grain = std::max(grain, (items + limit - 1) / limit);
  torch::stable::parallel_for(0, items, grain, f);
}

inline Tensor empty_like_shape(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

// float32, or float64 beside float64: the dtype of a log-determinant and of any sum.
inline ScalarType sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pygen
