// What the host checks of cached attention before a loop or a launch; what only the device knows (lengths) marks rows.
#pragma once

#include "tensor.h"

namespace pygen {

inline void check_attend_cached(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                const Tensor& value_cache, const Tensor& lengths) {
  check(query.dim() == 4, "query has shape ", shape_of(query), ", but expected (batch, heads, block, width)");
  check(key_cache.dim() == 4, "key_cache has shape ", shape_of(key_cache),
        ", but expected (batch, kv_heads, capacity, width)");
  const int64_t batch = query.size(0), kv_heads = key_cache.size(1), capacity = key_cache.size(2);
  const int64_t block = query.size(2), width = query.size(3);
  check(kv_heads > 0 && query.size(1) % kv_heads == 0, "query has ", query.size(1),
        " heads, but expected a multiple of the ", kv_heads, " heads of key_cache");
  for (const auto& [name, cache] : {std::pair<const char*, const Tensor&>{"key_cache", key_cache},
                                    std::pair<const char*, const Tensor&>{"value_cache", value_cache}}) {
    check(cache.dim() == 4 && cache.size(0) == batch && cache.size(1) == kv_heads && cache.size(2) == capacity &&
              cache.size(3) == width,
          name, " has shape ", shape_of(cache), ", but expected (", batch, ", ", kv_heads, ", ", capacity, ", ", width,
          ")");
    check(cache.scalar_type() == key_cache.scalar_type() && is_floating(cache.scalar_type()), name,
          " has another dtype than key_cache, or one that is not supported");
    check(width <= 1 || cache.stride(3) == 1, name, " has stride ", cache.stride(3),
          " in its last dimension, but expected 1: a cache is appended to in place and never copied");
    for (int64_t d = 0; d < 3; ++d)
      check(cache.size(d) <= 1 || cache.stride(d) != 0, name, " has stride 0 in dimension ", d,
            ", but expected memory of its own for every element: it is changed in place");
    check(same_device(cache, query), name, " is on another device than query");
  }
  check(width > 0 && capacity > 0, "key_cache has shape ", shape_of(key_cache),
        ", but expected a positive capacity and width");
  for (const auto& [name, fresh] :
       {std::pair<const char*, const Tensor&>{"key", key}, std::pair<const char*, const Tensor&>{"value", value}}) {
    check(fresh.dim() == 4 && fresh.size(0) == batch && fresh.size(1) == kv_heads && fresh.size(2) == block &&
              fresh.size(3) == width,
          name, " has shape ", shape_of(fresh), ", but expected (", batch, ", ", kv_heads, ", ", block, ", ", width,
          ")");
    check(is_floating(fresh.scalar_type()), name, " has a dtype that is not supported: expected a floating dtype");
    check(same_device(fresh, query), name, " is on another device than query");
  }
  check(is_floating(query.scalar_type()), "query has a dtype that is not supported: expected a floating dtype");
  check((query.scalar_type() == ScalarType::Double) == (key_cache.scalar_type() == ScalarType::Double),
        "query and key_cache must both be float64, or neither");
  check(lengths.dim() == 1 && lengths.size(0) == batch && lengths.scalar_type() == ScalarType::Int,
        "lengths has shape ", shape_of(lengths), ", but expected int32 of shape (", batch, ",)");
  check(
      batch <= 1 || lengths.stride(0) != 0,
      "lengths has stride 0 in dimension 0, but expected memory of its own for every element: it is changed in place");
  check(same_device(lengths, query), "lengths is on another device than query");
}

}  // namespace pygen
