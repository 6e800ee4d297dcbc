// Attention over the kept keys and values of the tokens before, one block of tokens at a time: (peak, sum, accumulator)
// of softmax(scale q k^T) v, where tokens lie in a cache, and what a token sees of them.
//
// With scores s_j, peak m = max s_j, sum l = sum e^{s_j - m} and accumulator a = sum e^{s_j - m} v_j, the result is a /
// l, and two disjoint sets of keys merge as below (Milakov and Gimelshein 2018, arXiv:1805.02867, section 3.1). A token
// sees those before it, or a window of them and the first few, the sinks (Xiao et al. 2023, arXiv:2309.17453).
#pragma once

#include <type_traits>

#include "scalar.h"

namespace pygen::cache {

template <class T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();  // the peak of no keys

// By how much sums and accumulators shrink when their peak rises from `old_peak` to `peak`.
template <class T>
PYGEN_INLINE T shrinkage(T old_peak, T peak) {
  return old_peak == peak ? T(1) : scalar::exp(old_peak - peak);
}

template <class T>
PYGEN_INLINE T higher(T a, T b) {
  return a > b ? a : b;
}

PYGEN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PYGEN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What a block of new tokens sees of a sequence. Positions are read in two stretches, the sinks and the rest, each cut
// into splits of a fixed number of keys; which keys a split holds follows from the row's own length alone.
struct Sight {
  int64_t block, window, sinks;  // a window of 0: everything before; then there are no sinks either
  int64_t split;                 // keys
  bool causal;                   // else every token of the block sees the whole block

  // The first and the last position, exclusive, that token i of the block sees, the sinks apart.
  PYGEN_INLINE int64_t first(int64_t before, int64_t i) const {
    return window ? most(sinks, before + i - window + 1) : 0;
  }
  PYGEN_INLINE int64_t last(int64_t before, int64_t i) const { return before + (causal ? i + 1 : block); }

  PYGEN_INLINE int64_t sink_splits() const { return (sinks + split - 1) / split; }
  PYGEN_INLINE int64_t splits(int64_t before) const {
    return sink_splits() + (most(0, before + block - first(before, 0)) + split - 1) / split;
  }
  PYGEN_INLINE int64_t most_splits(int64_t capacity) const {
    return sink_splits() + ((window ? window + block - 1 : capacity) + split - 1) / split;
  }
  PYGEN_INLINE int64_t begin(int64_t before, int64_t s) const {
    return s < sink_splits() ? s * split : first(before, 0) + (s - sink_splits()) * split;
  }
  PYGEN_INLINE int64_t end(int64_t before, int64_t s) const {
    const int64_t end = begin(before, s) + split;
    return least(s < sink_splits() ? least(end, sinks) : end, before + block);
  }
};

// (batch or pages, heads, places, ...): keys, values or their scales, of which a row's last dimension lies dense.
template <class T>
struct Array {
  T* data;
  int64_t stride[3];
};

// In which place of an array the token at a position of a sequence lies.
struct Layout {
  int64_t capacity;  // of a sequence
  int64_t sinks;     // past its capacity a cache with a window goes round the places behind them
  bool ring;
  const int32_t* pages;  // (batch, capacity / page size), or null
  int64_t pages_stride[2];
  int64_t page_count;
  int page_shift;  // a page holds 2^shift tokens

  PYGEN_INLINE int64_t page_size() const { return int64_t{1} << page_shift; }
  // The place behind the sinks of a position past the capacity.
  PYGEN_INLINE int64_t turned(int64_t position) const {
    return static_cast<uint32_t>(position - sinks) % static_cast<uint32_t>(capacity - sinks);
  }
  // How many positions from this one on lie in neighbouring places.
  PYGEN_INLINE int64_t run(int64_t position) const {
    if (pages) return page_size() - (position & (page_size() - 1));
    return position < capacity ? capacity - position : capacity - sinks - turned(position);
  }
};

// The places of one head of one sequence.
template <class T>
struct Places {
  T* data;
  int64_t stride, page_stride;
  Layout layout;
  const int32_t* pages;

  PYGEN_INLINE Places(const Array<T>& array, const Layout& from, int64_t b, int64_t h)
      : data(array.data + h * array.stride[1] + (from.pages ? 0 : b * array.stride[0])),
        stride(array.stride[2]),
        page_stride(array.stride[0]),
        layout(from),
        pages(from.pages ? from.pages + b * from.pages_stride[0] : nullptr) {}

  PYGEN_INLINE T* at(int64_t position) const {
    if (pages) {
      const int64_t page = pages[(position >> layout.page_shift) * layout.pages_stride[1]];
      return data + page * page_stride + (position & (layout.page_size() - 1)) * stride;
    }
    if (position < layout.capacity) return data + position * stride;
    return data + (layout.sinks + layout.turned(position)) * stride;
  }
};

// How many tokens the row has before the block: -1 marks a row that the block does not fit. `appended`: the block is
// not among its `length` tokens yet.
PYGEN_INLINE int64_t length_before(int32_t length, bool appended, const Sight& sight, const Layout& layout) {
  const int64_t before = appended ? length : length - sight.block;
  const int64_t most = layout.ring ? std::numeric_limits<int32_t>::max() : layout.capacity;
  return before >= 0 && before + sight.block <= most ? before : -1;
}

// Whether the page of a row's index-th stretch of tokens exists, or nothing is read of it.
PYGEN_INLINE bool page_exists(const Layout& layout, const Sight& sight, int64_t before, int64_t b, int64_t index) {
  const int64_t from = index << layout.page_shift, to = (index + 1) << layout.page_shift;
  if (from >= before + sight.block || (to <= sight.first(before, 0) && from >= sight.sinks)) return true;
  const int32_t page = layout.pages[b * layout.pages_stride[0] + index * layout.pages_stride[1]];
  return page >= 0 && page < layout.page_count;
}

// Rotary embedding, of the first 2 `pairs` elements of a row (Su et al. 2021, arXiv:2104.09864, section 3.4.2). With
// two axes the first half of them is turned by the first half of a table row, and the second by the second (Heo et al.
// 2024, arXiv:2403.13298, section 3.2).
template <class T>
struct Rotary {
  const T *cos, *sin;  // (rows, pairs), or null
  int64_t cos_stride, sin_stride, rows, pairs, axes;
  bool interleaved, sinks_in_cache;
  const void* positions;  // int32 or int64, (batch, block), or null: a token's position in the sequence
  bool long_positions;
  int64_t positions_stride[2];

  // The table row of token i of the block.
  PYGEN_INLINE int64_t row(int64_t b, int64_t before, int64_t i) const {
    if (!positions) return before + i;
    const int64_t at = b * positions_stride[0] + i * positions_stride[1];
    return long_positions ? static_cast<const int64_t*>(positions)[at] : static_cast<const int32_t*>(positions)[at];
  }
  PYGEN_INLINE bool has_row(int64_t b, int64_t before, int64_t i) const {
    const int64_t own = row(b, before, i);
    return own >= 0 && own < rows;
  }
  // The table row by which a query meets the sinks. Within the cache they are neighbours of the window: the query is as
  // many places nearer to them as tokens between were dropped.
  PYGEN_INLINE int64_t row_for_sinks(int64_t b, int64_t before, int64_t i, const Sight& sight) const {
    const int64_t dropped = most(0, before + i - (sight.sinks + sight.window - 1));
    return most(0, row(b, before, i) - (sinks_in_cache ? dropped : 0));
  }
};

template <class T>
PYGEN_INLINE T turned_first(T first, T second, T cos, T sin) {
  return first * cos - second * sin;
}
template <class T>
PYGEN_INLINE T turned_second(T first, T second, T cos, T sin) {
  return second * cos + first * sin;
}

// Element d of a row x(0), x(1), ... turned by a row of the table.
template <class T, class Row>
PYGEN_INLINE T turned(const Rotary<T>& rotary, int64_t row, int d, const Row& x) {
  const int axis = static_cast<int>(2 * rotary.pairs / rotary.axes), half = axis / 2;
  if (d >= 2 * static_cast<int>(rotary.pairs)) return x(d);
  const int within = d % axis;
  const bool second = rotary.interleaved ? within & 1 : within >= half;
  const int pair = d / axis * half + (rotary.interleaved ? within / 2 : within % half);
  const int partner = d + (second ? -1 : 1) * (rotary.interleaved ? 1 : half);
  const T cos = rotary.cos[row * rotary.cos_stride + pair], sin = rotary.sin[row * rotary.sin_stride + pair];
  return second ? turned_second(x(partner), x(d), cos, sin) : turned_first(x(d), x(partner), cos, sin);
}

// A mask over positions: what is not true is not seen, or it is added to the score, and minus infinity is not seen.
enum class MaskKind : int { kNone, kBool, kFloat, kDouble, kBFloat16, kHalf };

struct Mask {
  const void* data;
  MaskKind kind;
  int64_t stride[4];  // 0 along a dimension of size 1
  int64_t columns;    // positions past them are not seen

  PYGEN_INLINE int64_t row(int64_t b, int64_t h, int64_t i) const {
    return b * stride[0] + h * stride[1] + i * stride[2];
  }
  // What is added to the score at a position.
  template <class T>
  PYGEN_INLINE T at(int64_t row, int64_t position) const {
    if (position >= columns) return kNothing<T>;
    const int64_t at = row + position * stride[3];
    switch (kind) {
      case MaskKind::kBool:
        return static_cast<const uint8_t*>(data)[at] ? T(0) : kNothing<T>;
      case MaskKind::kDouble:
        return static_cast<T>(static_cast<const double*>(data)[at]);
      case MaskKind::kBFloat16:
        return scalar::float_of_bfloat16(static_cast<const uint16_t*>(data)[at]);
      case MaskKind::kHalf:
        return scalar::float_of_half(static_cast<const uint16_t*>(data)[at]);
      default:
        return static_cast<const float*>(data)[at];
    }
  }
};

// 8-bit storage: a row x of a key or a value is kept as codes x / scale, with scale = max |x| / the largest code. One
// scale a row leaves rows that were kept before as they are, and multiplies a score, or a weight, instead of elements.
struct Float8 {
  uint8_t bits;  // float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433, table 1)
};

template <class Stored>
constexpr bool kScaled = std::is_same_v<Stored, int8_t> || std::is_same_v<Stored, Float8>;

template <class Stored>
constexpr float kLargestCode = std::is_same_v<Stored, int8_t> ? 127.0f : 448.0f;

// 0 where division by it would overflow, NaN for a row that is not finite.
template <class Stored>
PYGEN_INLINE float row_scale(float largest) {
  if (!(largest <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  const float scale = largest / kLargestCode<Stored>;
  return scale < std::numeric_limits<float>::min() ? 0.0f : scale;
}

// The nearest code of x, even among two.
PYGEN_INLINE void encode(float x, float scale, int8_t* code) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  *code = scale > 0 ? static_cast<int8_t>((x / scale + kRound) - kRound) : int8_t{0};
}

PYGEN_INLINE void encode(float x, float scale, Float8* code) {
  const float value = scale > 0 ? x / scale : 0.0f;
  const uint32_t bits = scalar::bits_of(value), magnitude = bits & 0x7fffffffu;
  uint32_t rounded = (magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;  // 3 bits of mantissa
  rounded -= (127 - 7) << 3;
  if (magnitude < 0x3c800000u) {  // below 2^-6: multiples of 2^-9, which is the last bit of numbers near 2^14
    rounded = scalar::bits_of(scalar::float_of(magnitude) + 16384.0f) - scalar::bits_of(16384.0f);
  }
  code->bits = static_cast<uint8_t>(rounded | (bits >> 24 & 0x80));
}

PYGEN_INLINE float decode(int8_t code) { return static_cast<float>(code); }

// Codes that PyTorch reads as NaN count as 480: a row that is not finite has a scale of NaN and finite codes.
PYGEN_INLINE float decode(Float8 code) {
  // 2^120 moves the exponent's bias from 7 to 127, denormals included.
  const float magnitude = scalar::float_of(static_cast<uint32_t>(code.bits & 0x7f) << 20) * 0x1p120f;
  return scalar::float_of(scalar::bits_of(magnitude) | static_cast<uint32_t>(code.bits & 0x80) << 24);
}

}  // namespace pygen::cache
