// The tensors that describe a cache, a rotary embedding and a mask, as both devices' loops take them.
#pragma once

#include "cache.h"
#include "tensor.h"

namespace pygen {

using OptionalTensor = std::optional<Tensor>;

// Scales belong to 8-bit caches; with `pages` the first dimension of caches and scales counts pages.
struct Caches {
  Tensor keys, values, lengths;
  OptionalTensor key_scales, value_scales, pages;
  int64_t window, sinks;

  int64_t heads() const { return keys.size(1); }
  int64_t width() const { return keys.size(3); }
  int64_t batch() const { return lengths.size(0); }
  int64_t capacity() const { return pages ? pages->size(1) * keys.size(2) : keys.size(2); }
};

struct RotaryTensors {
  OptionalTensor cos, sin, positions;
  bool interleaved;
  int64_t axes;
  bool sinks_in_cache = false;
};

// Calls f(T{}) with the C++ type that a cache stores.
template <class F>
inline decltype(auto) for_stored(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Char) return f(int8_t{});
  if (dtype == ScalarType::Float8_e4m3fn) return f(cache::Float8{});
  return for_dtype(dtype, f);
}

inline cache::Layout layout_of(const Caches& caches) {
  cache::Layout layout{};
  layout.capacity = caches.capacity();
  layout.sinks = caches.sinks;
  layout.ring = caches.window > 0 && !caches.pages;
  if (caches.pages) {
    layout.pages = static_cast<const int32_t*>(caches.pages->data_ptr());
    layout.pages_stride[0] = caches.pages->stride(0);
    layout.pages_stride[1] = caches.pages->stride(1);
    layout.page_count = caches.keys.size(0);
    layout.page_shift = std::countr_zero(static_cast<uint64_t>(caches.keys.size(2)));
  }
  return layout;
}

template <class T>
cache::Array<T> array_of(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), {x.stride(0), x.stride(1), x.stride(2)}};
}

inline cache::Array<float> scales_of(const OptionalTensor& x) {
  return x ? array_of<float>(*x) : cache::Array<float>{};
}

template <class T>
cache::Rotary<T> rotary_of(const RotaryTensors& x) {
  cache::Rotary<T> rotary{};
  if (!x.cos) return rotary;
  rotary.cos = static_cast<const T*>(x.cos->data_ptr());
  rotary.sin = static_cast<const T*>(x.sin->data_ptr());
  rotary.cos_stride = x.cos->stride(0);
  rotary.sin_stride = x.sin->stride(0);
  rotary.rows = x.cos->size(0);
  rotary.pairs = x.cos->size(1);
  rotary.axes = x.axes;
  rotary.interleaved = x.interleaved;
  rotary.sinks_in_cache = x.sinks_in_cache;
  if (x.positions) {
    rotary.positions = x.positions->data_ptr();
    rotary.long_positions = x.positions->scalar_type() == ScalarType::Long;
    for (int d = 0; d < 2; ++d) rotary.positions_stride[d] = x.positions->size(d) == 1 ? 0 : x.positions->stride(d);
  }
  return rotary;
}

inline cache::MaskKind mask_kind(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return cache::MaskKind::kBool;
    case ScalarType::Float:
      return cache::MaskKind::kFloat;
    case ScalarType::Double:
      return cache::MaskKind::kDouble;
    case ScalarType::BFloat16:
      return cache::MaskKind::kBFloat16;
    case ScalarType::Half:
      return cache::MaskKind::kHalf;
    default:
      return cache::MaskKind::kNone;
  }
}

inline cache::Mask mask_of(const OptionalTensor& x) {
  cache::Mask mask{};
  if (!x) return mask;
  mask.data = x->data_ptr();
  mask.kind = mask_kind(x->scalar_type());
  for (int d = 0; d < 4; ++d) mask.stride[d] = d < 3 && x->size(d) == 1 ? 0 : x->stride(d);
  mask.columns = x->size(3);
  return mask;
}

}  // namespace pygen
