// Elements with many parameters each, `kLanes` at a time: the parameters are turned from one record an element to one
// array a parameter, so that loops run across elements and vectorise for any number of parameters.
//
// Elements are numbered through all dimensions, row after row: lanes are full however short a row is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "tensor.h"

namespace pygen {

template <class T>
constexpr ScalarType own_dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Two of the widest vectors of float: loops of this constant length unroll, and have no tail that rounds otherwise.
constexpr int64_t kLanes = 32;

// (n, count) records, `apart` from one to the next, to count arrays of kLanes, and dense ones back. Vectorised in
// lanes.cpp.
void turn_to_lanes(const float* records, int64_t apart, int64_t n, int64_t count, float* lanes);
void turn_to_lanes(const double* records, int64_t apart, int64_t n, int64_t count, double* lanes);
void turn_to_records(const float* lanes, int64_t n, int64_t count, float* records);
void turn_to_records(const double* lanes, int64_t n, int64_t count, double* records);

// A tensor (..., count) as `count` parameters for each of its elements (...).
struct Records {
  Rows values;    // all parameters of all elements, in one row
  Rows elements;  // the first parameter of each element, in one row
  int64_t count = 0, stride = 0;

  Records() = default;
  explicit Records(const Tensor& x)
      : values(x, x.dim()), elements(x, x.dim() - 1, 1), count(x.size(x.dim() - 1)), stride(x.stride(x.dim() - 1)) {}

  // Whether neighbouring elements lie side by side and their parameters apart, as a convolution leaves its channels.
  bool planar() const {
    return stride != 1 && elements.event_dims > 0 && elements.event_strides[elements.event_dims - 1] == 1;
  }

  // Whether elements lie evenly spaced and their parameters side by side, as packed parameters and slices of them do.
  bool even() const { return (stride == 1 || count == 1) && elements.event_dims <= 1; }
  int64_t apart() const { return elements.event_dims == 1 ? elements.event_strides[0] : count; }
};

// Asks for the records that the next block will read, while this one is computed.
template <class T>
inline void prefetch_records(const T* records, int64_t apart, int64_t n, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < count; k += kLine) __builtin_prefetch(records + i * apart + k);
  }
}

// Elements start .. start + n of a tensor as (count, kLanes), zeros beyond n. `scratch` is kLanes * count numbers.
template <class T>
inline void read_lanes(const Records& records, int64_t start, int64_t n, T* lanes, T* scratch) {
  const int64_t count = records.count;
  if (records.planar()) {
    for_dtype(records.elements.dtype, [&](auto stored) {
      using Stored = decltype(stored);
      const Rows& elements = records.elements;
      const int64_t inner = elements.event_sizes[elements.event_dims - 1];
      for (int64_t done = 0; done < n;) {
        const int64_t run = std::min(n - done, inner - (start + done) % inner);
        const Stored* from = static_cast<const Stored*>(elements.data) + elements.event_offset(start + done);
        for (int64_t k = 0; k < count; ++k) {
          copy_strided(from + k * records.stride, int64_t{1}, run, lanes + k * kLanes + done);
        }
        done += run;
      }
    });
  } else if (records.even() && records.elements.dtype == own_dtype<T>) {
    const int64_t apart = records.apart();
    const T* const from = static_cast<const T*>(records.elements.data) + start * apart;
    turn_to_lanes(from, apart, n, count, lanes);
    prefetch_records(from + n * apart, apart, std::min(kLanes, records.elements.width - start - n), count);
  } else {
    turn_to_lanes(read_block(records.values, 0, start * count, n * count, scratch), count, n, count, lanes);
  }
  if (n < kLanes) {
    for (int64_t k = 0; k < count; ++k) std::fill(lanes + k * kLanes + n, lanes + (k + 1) * kLanes, T(0));
  }
}

// One value an element.
template <class T>
inline void read_lanes(const Rows& elements, int64_t start, int64_t n, T* lanes) {
  const T* values = read_block(elements, 0, start, n, lanes);
  if (values != lanes) std::copy(values, values + n, lanes);
  std::fill(lanes + n, lanes + kLanes, T(0));
}

// The first n lanes to elements start .. start + n of a dense tensor (..., count). `scratch` is kLanes * count numbers.
template <class T>
inline void write_lanes(const T* lanes, int64_t start, int64_t n, int64_t count, void* data, ScalarType dtype,
                        T* scratch) {
  T* const records = block_target(data, dtype, start * count, scratch);
  turn_to_records(lanes, n, count, records);
  write_block(data, dtype, start * count, n * count, records);
}

// The value of each element's row, for elements start .. start + n.
template <class T>
inline void spread_lanes(const Rows& rows, int64_t width, int64_t start, int64_t n, T* lanes) {
  T buffer = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t row = (start + i) / width;
    const int64_t until = std::min(n, (row + 1) * width - start);
    std::fill(lanes + i, lanes + until, *read_block(rows, 0, row, 1, &buffer));
    i = until;
  }
  std::fill(lanes + n, lanes + kLanes, T(0));
}

// Calls block(start, n, values, scratch) over all elements, kLanes at a time, on as many threads as the work is worth
// (`cost` is about nanoseconds per element); the block fills values[0 .. n). Their sums over each row of `width`
// elements go to `sums`, where that is not null. `scratch` is `scratch_size` numbers of the thread's own.
template <class T, class Block>
inline void for_lanes(int64_t rows, int64_t width, int64_t cost, int64_t scratch_size, T* sums, const Block& block) {
  // Elements of a row that are added by one thread. Fixed, because it decides the order of the sum.
  constexpr int64_t kPiece = 1024;
  if (width == 0) {
    if (sums) std::fill(sums, sums + rows, T(0));
    return;
  }
  const int64_t pieces = (width + kPiece - 1) / kPiece, items = rows * pieces;
  const auto first = [&](int64_t item) { return item / pieces * width + item % pieces * kPiece; };
  std::vector<double> partial(static_cast<size_t>(sums && pieces > 1 ? items : 0));
  parallel(items, cost * std::min(width, kPiece), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(scratch_size)]);
    T values[kLanes];
    double sum = 0;
    int64_t item = begin;
    const int64_t stop = first(end);
    for (int64_t start = first(begin); start < stop; start += kLanes) {
      const int64_t n = std::min(kLanes, stop - start);
      block(start, n, values, scratch.get());
      if (!sums) continue;
      for (int64_t i = 0; i < n; ++i) {
        sum += values[i];
        if (start + i + 1 < first(item + 1)) continue;
        if (pieces > 1) {
          partial[static_cast<size_t>(item)] = sum;
        } else {
          sums[item] = static_cast<T>(sum);
        }
        sum = 0;
        ++item;
      }
    }
  });
  if (!sums || pieces == 1) return;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[static_cast<size_t>(row * pieces + piece)];
    sums[row] = static_cast<T>(sum);
  }
}

}  // namespace pygen
