// What the host checks of cached attention before a loop or a launch; what only the device knows (lengths, pages, the
// rows of a rotary table) marks rows.
#pragma once

#include "cache_arguments.h"

namespace pygen {

inline void check_own_memory(const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    check(x.size(d) <= 1 || x.stride(d) != 0, name, " has stride 0 in dimension ", d,
          ", but expected memory of its own for every element: it is changed in place");
  }
}

inline void check_scales(const char* name, const OptionalTensor& scales, const Tensor& cache, bool wanted) {
  check(scales.has_value() == wanted, name, wanted ? " is missing, but expected it with" : " was given, but expected",
        wanted ? " an 8-bit cache" : " none: the cache is not of 8 bits");
  if (!scales) return;
  check(scales->dim() == 3 && scales->size(0) == cache.size(0) && scales->size(1) == cache.size(1) &&
            scales->size(2) == cache.size(2) && scales->scalar_type() == ScalarType::Float,
        name, " has shape ", shape_of(*scales), ", but expected float32 of shape (", cache.size(0), ", ", cache.size(1),
        ", ", cache.size(2), ")");
  check_own_memory(name, *scales);
  check(same_device(*scales, cache), name, " is on another device than key_cache");
}

inline void check_caches(const Caches& x) {
  check(x.keys.dim() == 4, "key_cache has shape ", shape_of(x.keys),
        ", but expected (batch, kv_heads, capacity, width)");
  check(x.lengths.dim() == 1 && x.lengths.scalar_type() == ScalarType::Int, "lengths has shape ", shape_of(x.lengths),
        ", but expected int32 of one dimension");
  const ScalarType dtype = x.keys.scalar_type();
  const bool scaled = dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn;
  for (const auto& [name, cache] : {std::pair<const char*, const Tensor&>{"key_cache", x.keys},
                                    std::pair<const char*, const Tensor&>{"value_cache", x.values}}) {
    check(same_shape(cache, x.keys), name, " has shape ", shape_of(cache), ", but expected ", shape_of(x.keys));
    check(cache.scalar_type() == dtype && (scaled || is_floating(dtype)), name,
          " has another dtype than key_cache, or one that is not supported");
    check(cache.size(3) <= 1 || cache.stride(3) == 1, name, " has stride ", cache.stride(3),
          " in its last dimension, but expected 1: a cache is appended to in place and never copied");
    check_own_memory(name, cache);
    check(same_device(cache, x.lengths), name, " is on another device than lengths");
  }
  check(x.keys.size(1) > 0 && x.keys.size(2) > 0 && x.keys.size(3) > 0, "key_cache has shape ", shape_of(x.keys),
        ", but expected at least one head, a positive capacity and width");
  check_scales("key_scales", x.key_scales, x.keys, scaled);
  check_scales("value_scales", x.value_scales, x.values, scaled);
  check_own_memory("lengths", x.lengths);
  check(x.window >= 0 && x.sinks >= 0 && (x.window > 0 || x.sinks == 0), "window is ", x.window, " and sinks is ",
        x.sinks, ", but expected neither negative, and sinks only with a window");
  if (x.pages) {
    check(x.pages->dim() == 2 && x.pages->size(0) == x.batch() && x.pages->scalar_type() == ScalarType::Int,
          "pages has shape ", shape_of(*x.pages), ", but expected int32 of shape (", x.batch(),
          ", pages of a sequence)");
    check(same_device(*x.pages, x.lengths), "pages is on another device than lengths");
    check((x.keys.size(2) & (x.keys.size(2) - 1)) == 0, "key_cache has pages of ", x.keys.size(2),
          " tokens, but expected a power of two");
  } else {
    check(x.keys.size(0) == x.batch(), "key_cache has shape ", shape_of(x.keys), ", but expected a batch of ",
          x.batch(), ", which lengths has");
  }
}

// The block fits behind the sinks of a ring without writing over what its first token still sees.
inline void check_ring(const Caches& x, int64_t block) {
  check(x.window == 0 || x.pages || x.capacity() >= x.sinks + x.window + block - 1, "key_cache has a capacity of ",
        x.capacity(), ", but expected at least sinks + window + block - 1 = ", x.sinks + x.window + block - 1);
}

inline void check_new(const char* name, const Tensor& fresh, const Caches& x, int64_t block) {
  check(fresh.dim() == 4 && fresh.size(0) == x.batch() && fresh.size(1) == x.heads() && fresh.size(2) == block &&
            fresh.size(3) == x.width(),
        name, " has shape ", shape_of(fresh), ", but expected (", x.batch(), ", ", x.heads(), ", ", block, ", ",
        x.width(), ")");
  check(is_floating(fresh.scalar_type()), name, " has a dtype that is not supported: expected a floating dtype");
  check((fresh.scalar_type() == ScalarType::Double) == (x.keys.scalar_type() == ScalarType::Double), name,
        " and key_cache must both be float64, or neither");
  check(same_device(fresh, x.lengths), name, " is on another device than lengths");
}

inline void check_rotary(const RotaryTensors& x, const Caches& caches, int64_t block) {
  check(x.cos.has_value() == x.sin.has_value() && (x.cos || !x.positions),
        "cos and sin, and positions only with them, are to be given together");
  if (!x.cos) return;
  const ScalarType dtype = caches.keys.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const auto& [name, table] :
       {std::pair<const char*, const Tensor&>{"cos", *x.cos}, std::pair<const char*, const Tensor&>{"sin", *x.sin}}) {
    check(table.dim() == 2 && same_shape(table, *x.cos) && 2 * table.size(1) <= caches.width(), name, " has shape ",
          shape_of(table), ", but expected (positions, at most ", caches.width() / 2, ")");
    check(table.scalar_type() == dtype, name,
          " must have the dtype of the arithmetic: float64 beside float64, else float32");
    check(table.size(1) <= 1 || table.stride(1) == 1, name, " must lie dense in its last dimension");
    check(same_device(table, caches.lengths), name, " is on another device than lengths");
  }
  check((x.axes == 1 || x.axes == 2) && x.cos->size(1) % x.axes == 0, "axes is ", x.axes,
        ", but expected 1, or 2 with an even number of columns of cos");
  if (!x.positions) return;
  const Tensor& positions = *x.positions;
  check(positions.dim() == 2 && (positions.size(0) == caches.batch() || positions.size(0) == 1) &&
            positions.size(1) == block &&
            (positions.scalar_type() == ScalarType::Int || positions.scalar_type() == ScalarType::Long),
        "positions has shape ", shape_of(positions), ", but expected integers of shape (", caches.batch(), " or 1, ",
        block, ")");
  check(same_device(positions, caches.lengths), "positions is on another device than lengths");
}

inline void check_append_cached(const Tensor& key, const Tensor& value, const Caches& caches,
                                const RotaryTensors& rotary) {
  check_caches(caches);
  check(key.dim() == 4, "key has shape ", shape_of(key), ", but expected (batch, kv_heads, block, width)");
  check_new("key", key, caches, key.size(2));
  check_new("value", value, caches, key.size(2));
  check_ring(caches, key.size(2));
  check_rotary(rotary, caches, key.size(2));
}

inline void check_attend_cached(const Tensor& query, const OptionalTensor& key, const OptionalTensor& value,
                                const Caches& caches, const OptionalTensor& mask, const RotaryTensors& rotary) {
  check(query.dim() == 4, "query has shape ", shape_of(query), ", but expected (batch, heads, block, width)");
  check_caches(caches);
  const int64_t block = query.size(2), heads = query.size(1);
  check(heads % caches.heads() == 0, "query has ", heads, " heads, but expected a multiple of the ", caches.heads(),
        " heads of key_cache");
  check(query.size(0) == caches.batch() && query.size(3) == caches.width(), "query has shape ", shape_of(query),
        ", but expected a batch of ", caches.batch(), " and a width of ", caches.width());
  check(is_floating(query.scalar_type()), "query has a dtype that is not supported: expected a floating dtype");
  check((query.scalar_type() == ScalarType::Double) == (caches.keys.scalar_type() == ScalarType::Double),
        "query and key_cache must both be float64, or neither");
  check(same_device(query, caches.lengths), "lengths is on another device than query");
  check(key.has_value() == value.has_value(), "key and value are to be given together");
  if (key) check_new("key", *key, caches, block);
  if (value) check_new("value", *value, caches, block);
  check_ring(caches, block);
  check_rotary(rotary, caches, block);
  if (!mask) return;
  const auto fits = [&](int64_t d, int64_t size) { return mask->size(d) == 1 || mask->size(d) == size; };
  check(mask->dim() == 4 && fits(0, caches.batch()) && fits(1, heads) && fits(2, block), "mask has shape ",
        shape_of(*mask), ", but expected (", caches.batch(), " or 1, ", heads, " or 1, ", block, " or 1, positions)");
  check(mask_kind(mask->scalar_type()) != cache::MaskKind::kNone,
        "mask has a dtype that is not supported: expected bool or a floating dtype");
  check(same_device(*mask, caches.lengths), "mask is on another device than lengths");
}

}  // namespace pygen
