// What the CUDA kernels of cached attention share: their arguments, tensors of any floating dtype, and how new tokens
// go into the cache.
#pragma once

#include "cache.h"

#include "simt.h"
#include "tensor.h"

namespace pygen::cache {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Queries and new tokens come, and results go, in any floating dtype; they are few beside the keys.
struct AnyType {
  void* data;
  ScalarType dtype;
  int64_t stride[4];
  __device__ __forceinline__ int64_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return b * stride[0] + h * stride[1] + i * stride[2] + d * stride[3];
  }
};

template <class Compute>
__device__ __forceinline__ Compute load(const AnyType& x, int64_t at) {
  switch (x.dtype) {
    case ScalarType::Double:
      return static_cast<Compute>(static_cast<const double*>(x.data)[at]);
    case ScalarType::BFloat16:
      return static_cast<Compute>(static_cast<const BFloat16*>(x.data)[at]);
    case ScalarType::Half:
      return static_cast<Compute>(static_cast<const Half*>(x.data)[at]);
    default:
      return static_cast<Compute>(static_cast<const float*>(x.data)[at]);
  }
}

template <class Compute>
__device__ __forceinline__ void store(const AnyType& x, int64_t at, Compute value) {
  switch (x.dtype) {
    case ScalarType::Double:
      static_cast<double*>(x.data)[at] = static_cast<double>(value);
      return;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(x.data)[at] = static_cast<BFloat16>(static_cast<float>(value));
      return;
    case ScalarType::Half:
      static_cast<Half*>(x.data)[at] = static_cast<Half>(static_cast<float>(value));
      return;
    default:
      static_cast<float*>(x.data)[at] = static_cast<float>(value);
  }
}

template <class Stored, class Compute>
struct Arguments {
  AnyType query, out, new_keys, new_values;
  Array<Stored> keys, values;
  Array<float> key_scales, value_scales;
  Layout layout;
  Sight sight;
  Rotary<Compute> rotary;
  Mask mask;
  int32_t* lengths;
  int64_t length_stride;
  int64_t heads, group, width;  // key/value heads; query heads of each
  int64_t splits, tiles;        // splits of the keys; tiles of query rows
  Compute scale;
  bool aligned;
  bool appended;  // there are new tokens
  bool in_split;  // the split that reads new tokens also puts them into the cache
  // What the first kernel leaves for the last: the lengths before the append (batch,); and for each (batch, head,
  // row) and split the peak, the sum and the accumulator.
  int64_t* before;
  Compute *peak, *sum, *accumulator;
};

// Tokens of row b before the block, or -1 where it does not fit. All threads of the block call.
template <class Stored, class Compute>
__device__ __forceinline__ int64_t row_before(const Arguments<Stored, Compute>& x, int64_t b) {
  const int64_t before = length_before(x.lengths[b * x.length_stride], x.appended, x.sight, x.layout);
  if (before < 0 || (!x.rotary.cos && !x.layout.pages)) return before;
  bool bad = false;
  if (x.rotary.cos) {
    for (int64_t i = threadIdx.x; i < x.sight.block; i += kThreads) bad |= !x.rotary.has_row(b, before, i);
  }
  if (x.layout.pages) {
    for (int64_t page = threadIdx.x; page << x.layout.page_shift < before + x.sight.block; page += kThreads) {
      bad |= !page_exists(x.layout, x.sight, before, b, page);
    }
  }
  return __syncthreads_or(bad) ? -1 : before;
}

// New tokens from .. to - 1 of the block into the cache, a warp to a key or a value. All threads of the block call.
template <class Stored, class Compute>
__device__ __forceinline__ void append_tokens(const Arguments<Stored, Compute>& x, int64_t b, int64_t head,
                                              int64_t before, int64_t from, int64_t to) {
  const int lane = threadIdx.x % 32, width = static_cast<int>(x.width);
  for (int64_t n = threadIdx.x / 32; n < 2 * (to - from); n += kWarps) {
    const int64_t i = from + n / 2;
    const bool is_key = n % 2 == 0;
    const AnyType& source = is_key ? x.new_keys : x.new_values;
    const auto given = [&](int d) { return load<Compute>(source, source.at(b, head, i, d)); };
    const auto element = [&](int d) {
      if (!is_key || !x.rotary.cos) return given(d);
      return turned(x.rotary, x.rotary.row(b, before, i), d, given);
    };
    Stored* const row = Places<Stored>(is_key ? x.keys : x.values, x.layout, b, head).at(before + i);
    if constexpr (kScaled<Stored>) {
      float largest = 0;
      for (int d = lane; d < width; d += 32) {
        const float size = scalar::abs(element(d));
        if (size > largest || size != size) largest = size;
      }
      const float scale = row_scale<Stored>(warp_max(largest));
      const auto& scales = is_key ? x.key_scales : x.value_scales;
      if (lane == 0) *Places<float>(scales, x.layout, b, head).at(before + i) = scale;
      for (int d = lane; d < width; d += 32) encode(element(d), scale, row + d);
    } else {
      for (int d = lane; d < width; d += 32) row[d] = static_cast<Stored>(element(d));
    }
  }
}

}  // namespace pygen::cache
