// Records of parameters to lanes and back: 8 x 8 blocks transposed in vectors, exchanging halves, quarters and eighths
// (Eklundh 1972, "A fast computer method for matrix transposing").
#include "lanes.h"

#include <cstring>
#include <utility>

namespace pygen {
namespace {

constexpr int64_t kTile = 8;

template <class T>
struct Eight {
  typedef T type __attribute__((vector_size(kTile * sizeof(T))));
};

// Rows a and b exchange the blocks of `kHalf` columns that lie off the diagonal.
template <int kHalf, class V, size_t... kColumn>
PYGEN_INLINE void exchange(V& a, V& b, std::index_sequence<kColumn...>) {
  constexpr int n = kTile;
  const V left = __builtin_shufflevector(
      a, b, (kColumn & kHalf ? n + static_cast<int>(kColumn) - kHalf : static_cast<int>(kColumn))...);
  b = __builtin_shufflevector(a, b,
                              (kColumn & kHalf ? n + static_cast<int>(kColumn) : static_cast<int>(kColumn) + kHalf)...);
  a = left;
}

template <int kHalf, class V>
PYGEN_INLINE void exchange_rows(V* rows) {
  for (int i = 0; i < kTile; ++i) {
    if (!(i & kHalf)) exchange<kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kTile>());
  }
}

// to[k][i] = from[i][k] for an 8 x 8 block.
template <class T>
PYGEN_INLINE void turn_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  typename Eight<T>::type rows[kTile];
  for (int i = 0; i < kTile; ++i) memcpy(&rows[i], from + i * from_stride, sizeof rows[i]);
  exchange_rows<4>(rows);
  exchange_rows<2>(rows);
  exchange_rows<1>(rows);
  for (int i = 0; i < kTile; ++i) memcpy(to + i * to_stride, &rows[i], sizeof rows[i]);
}

// to[k][i] = from[i][k] for i < height, k < width. Where a side is no multiple of 8, its last tile overlaps the one
// before.
template <class T>
PYGEN_INLINE void turn(const T* __restrict from, int64_t from_stride, int64_t height, int64_t width, T* __restrict to,
                       int64_t to_stride) {
  if (height < kTile || width < kTile) {
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t i = 0; i < height; ++i) to[k * to_stride + i] = from[i * from_stride + k];
    }
    return;
  }
  for (int64_t i = 0; i < height; i += kTile) {
    const int64_t row = std::min(i, height - kTile);
    for (int64_t k = 0; k < width; k += kTile) {
      const int64_t column = std::min(k, width - kTile);
      turn_tile(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
    }
  }
}

PYGEN_CLONES void turn_floats(const float* from, int64_t from_stride, int64_t height, int64_t width, float* to,
                              int64_t to_stride) {
  turn(from, from_stride, height, width, to, to_stride);
}

PYGEN_CLONES void turn_doubles(const double* from, int64_t from_stride, int64_t height, int64_t width, double* to,
                               int64_t to_stride) {
  turn(from, from_stride, height, width, to, to_stride);
}

}  // namespace

void turn_to_lanes(const float* records, int64_t apart, int64_t n, int64_t count, float* lanes) {
  turn_floats(records, apart, n, count, lanes, kLanes);
}

void turn_to_lanes(const double* records, int64_t apart, int64_t n, int64_t count, double* lanes) {
  turn_doubles(records, apart, n, count, lanes, kLanes);
}

void turn_to_records(const float* lanes, int64_t n, int64_t count, float* records) {
  turn_floats(lanes, kLanes, count, n, records, count);
}

void turn_to_records(const double* lanes, int64_t n, int64_t count, double* records) {
  turn_doubles(lanes, kLanes, count, n, records, count);
}

}  // namespace pygen
