// Cached attention on CUDA, in two kernels. The first takes one split of the keys for a few query rows of one key/value
// head: lanes that share a key load it 16 bytes each, each such team keeps its own running softmax, and the teams merge
// at the end. The second merges the splits in order (no atomics: results repeat bit for bit). Where one block alone
// reads the new keys and values it also puts them into the cache, so that a step's append costs no launch of its own.
#include "cache_append.h"
#include "cache_checks.h"
#include "vector.h"

namespace pygen {
namespace {

using cache::AnyType;
using cache::Arguments;
using cache::kThreads;
using cache::kWarps;

constexpr int64_t kSmallestSplit = 128;
constexpr int64_t kMostSplits = 128;
constexpr int64_t kWidest = 512;
constexpr int64_t kManyRows = 64;  // from here on query rows alone fill the device, and splits would only cost memory

template <class Stored>
constexpr int kVector = sizeof(Stored) == 1 ? 8 : 16 / sizeof(Stored);  // elements that a lane loads at once
template <class Stored>
constexpr int kBatch = sizeof(Stored) == 1 ? 8 : 4;  // keys that a team has in flight

constexpr int kTokens = 8;  // new tokens that a block appends

template <class Stored, class Compute>
__global__ void __launch_bounds__(kThreads) append_kernel(Arguments<Stored, Compute> x) {
  const int64_t head = blockIdx.x % x.heads, b = blockIdx.x / x.heads, from = int64_t{blockIdx.y} * kTokens;
  const int64_t before = row_before(x, b);
  if (threadIdx.x == 0 && head == 0 && from == 0) x.before[b] = before;
  if (before >= 0) append_tokens(x, b, head, before, from, min(from + kTokens, x.sight.block));
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(int32_t* lengths, int64_t stride, const int64_t* before, int64_t batch, int64_t block) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b < batch && before[b] >= 0) lengths[b * stride] = static_cast<int32_t>(before[b] + block);
}

// The pack of a row from element e, zeros past its end.
template <class Stored, class Compute>
__device__ __forceinline__ void load_pack(const Stored* row, int64_t e, int64_t width, bool aligned, Compute* to) {
  const auto widen = [](Stored x) {
    if constexpr (cache::kScaled<Stored>) {
      return cache::decode(x);
    } else {
      return static_cast<Compute>(x);
    }
  };
  if (aligned && e + kVector<Stored> <= width) {
    const auto pack = *reinterpret_cast<const Vector<Stored, kVector<Stored>>*>(row + e);
#pragma unroll
    for (int v = 0; v < kVector<Stored>; ++v) to[v] = widen(pack.values[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVector<Stored>; ++v) to[v] = e + v < width ? widen(row[e + v]) : Compute(0);
  }
}

template <int kLanes, class T>
__device__ __forceinline__ T team_sum(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// A team of kLanes threads shares a key; kPacks packs per thread cover the width.
template <class Stored, class Compute, int kLanes, int kPacks, int kRows>
__global__ void __launch_bounds__(kThreads) attend_split_kernel(Arguments<Stored, Compute> x) {
  constexpr int kPack = kVector<Stored>, kKeys = kBatch<Stored>;
  constexpr int kOwn = kPacks * kPack;  // elements of the width that a thread holds
  constexpr int kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes, warp = threadIdx.x / 32;

  const int64_t tile = blockIdx.x % x.tiles, head = blockIdx.x / x.tiles % x.heads;
  const int64_t b = blockIdx.x / x.tiles / x.heads, split = blockIdx.y;
  const int64_t before = row_before(x, b);
  if (threadIdx.x == 0 && tile == 0 && head == 0 && split == 0) x.before[b] = before;
  if (before < 0 || split >= x.sight.splits(before)) return;
  const int64_t begin = x.sight.begin(before, split), split_end = x.sight.end(before, split);
  const bool sinks = split < x.sight.sink_splits();
  if (x.in_split && split_end > before) {
    append_tokens(x, b, head, before, max(begin, before) - before, split_end - before);
    __syncthreads();
  }

  const int64_t rows = x.group * x.sight.block;
  int64_t first[kRows], last[kRows], mask_row[kRows], end = begin;
  Compute query[kRows][kOwn], accumulator[kRows][kOwn], peak[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = tile * kRows + r, i = row % x.sight.block, query_head = head * x.group + row / x.sight.block;
    first[r] = sinks ? 0 : x.sight.first(before, i);
    last[r] = row < rows ? x.sight.last(before, i) : 0;
    mask_row[r] = row < rows ? x.mask.row(b, query_head, i) : 0;
    end = max(end, min(last[r], split_end));
    peak[r] = cache::kNothing<Compute>;
    sum[r] = 0;
    const auto given = [&](int d) { return load<Compute>(x.query, x.query.at(b, query_head, i, d)); };
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int d = (e / kPack * kLanes + lane) * kPack + e % kPack;
      query[r][e] = 0;
      if (row < rows && d < x.width) {
        const int64_t table = !x.rotary.cos ? 0
                              : sinks       ? x.rotary.row_for_sinks(b, before, i, x.sight)
                                            : x.rotary.row(b, before, i);
        query[r][e] = (x.rotary.cos ? cache::turned(x.rotary, table, d, given) : given(d)) * x.scale;
      }
      accumulator[r][e] = 0;
    }
  }

  const cache::Places<Stored> keys(x.keys, x.layout, b, head), values(x.values, x.layout, b, head);
  const cache::Places<float> key_scales(x.key_scales, x.layout, b, head);
  const cache::Places<float> value_scales(x.value_scales, x.layout, b, head);
  for (int64_t base = begin; base < end; base += kTeams * kKeys) {
    Compute score[kRows][kKeys];
    unsigned seen[kRows];  // a bit for each key
#pragma unroll
    for (int r = 0; r < kRows; ++r) seen[r] = 0;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int64_t j = base + k * kTeams + team;
      const Stored* row = keys.at(min(j, end - 1));
#pragma unroll
      for (int r = 0; r < kRows; ++r) score[r][k] = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        Compute key[kPack];
        load_pack(row, (p * kLanes + lane) * kPack, j < end ? x.width : 0, x.aligned, key);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int v = 0; v < kPack; ++v) score[r][k] += query[r][p * kPack + v] * key[v];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Compute highest = peak[r];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const int64_t j = base + k * kTeams + team;
        score[r][k] = team_sum<kLanes>(score[r][k]);
        bool sees = j < end && j >= first[r] && j < last[r];
        if constexpr (cache::kScaled<Stored>) {
          if (sees) score[r][k] *= *key_scales.at(j);
        }
        if (sees && x.mask.kind != cache::MaskKind::kNone) {
          const Compute bias = x.mask.template at<Compute>(mask_row[r], j);
          score[r][k] += bias;
          sees = bias != cache::kNothing<Compute> && score[r][k] != cache::kNothing<Compute>;
        }
        if (sees) {
          seen[r] |= 1u << k;
          highest = cache::higher(score[r][k], highest);
        }
      }
      const Compute shrink = cache::shrinkage(peak[r], highest);
      peak[r] = highest;
      sum[r] *= shrink;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) accumulator[r][e] *= shrink;
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        score[r][k] = seen[r] >> k & 1 ? scalar::exp(score[r][k] - highest) : Compute(0);
        sum[r] += score[r][k];
      }
    }
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const int64_t j = base + k * kTeams + team;
      const Stored* row = values.at(min(j, end - 1));
      Compute value_scale = 1;
      if constexpr (cache::kScaled<Stored>) value_scale = *value_scales.at(min(j, end - 1));
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        Compute value[kPack];
        load_pack(row, (p * kLanes + lane) * kPack, j < end ? x.width : 0, x.aligned, value);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          // Not by a weight of zero: what a row may not see can be infinite.
          if (seen[r] >> k & 1) {
            const Compute weight = score[r][k] * value_scale;
#pragma unroll
            for (int v = 0; v < kPack; ++v) accumulator[r][p * kPack + v] += weight * value[v];
          }
        }
      }
    }
  }

  // Teams of a warp by shuffles, then the warps through shared memory.
  SHARED(Compute, warp_peak, [kWarps][kRows]);
  SHARED(Compute, warp_sum, [kWarps][kRows]);
  SHARED(Compute, warp_accumulator, [kWarps][kRows][kLanes * kOwn]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      const Compute other_peak = __shfl_xor_sync(~0u, peak[r], offset);
      const Compute highest = cache::higher(other_peak, peak[r]);
      const Compute own = cache::shrinkage(peak[r], highest), other = cache::shrinkage(other_peak, highest);
      sum[r] = sum[r] * own + __shfl_xor_sync(~0u, sum[r], offset) * other;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        accumulator[r][e] = accumulator[r][e] * own + __shfl_xor_sync(~0u, accumulator[r][e], offset) * other;
      }
      peak[r] = highest;
    }
    if (threadIdx.x % 32 == 0) {
      warp_peak[warp][r] = peak[r];
      warp_sum[warp][r] = sum[r];
    }
    if (threadIdx.x % 32 < kLanes) {
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        warp_accumulator[warp][r][(e / kPack * kLanes + lane) * kPack + e % kPack] = accumulator[r][e];
      }
    }
  }
  __syncthreads();
  for (int r = 0; r < kRows && tile * kRows + r < rows; ++r) {
    Compute highest = cache::kNothing<Compute>;
    for (int w = 0; w < kWarps; ++w) highest = cache::higher(warp_peak[w][r], highest);
    Compute share[kWarps], total = 0;
    for (int w = 0; w < kWarps; ++w) {
      share[w] = cache::shrinkage(warp_peak[w][r], highest);
      total += warp_sum[w][r] * share[w];
    }
    const int64_t state = ((b * x.heads + head) * rows + tile * kRows + r) * x.splits + split;
    if (threadIdx.x == 0) {
      x.peak[state] = highest;
      x.sum[state] = total;
    }
    for (int64_t d = threadIdx.x; d < x.width; d += kThreads) {
      Compute value = 0;
      for (int w = 0; w < kWarps; ++w) value += warp_accumulator[w][r][d] * share[w];
      x.accumulator[state * x.width + d] = value;
    }
  }
}

template <class Stored, class Compute>
__global__ void __launch_bounds__(kThreads) merge_splits_kernel(Arguments<Stored, Compute> x) {
  const int64_t rows = x.group * x.sight.block, row = blockIdx.x % rows;
  const int64_t head = blockIdx.x / rows % x.heads, b = blockIdx.x / rows / x.heads;
  const int64_t before = x.before[b];
  if (threadIdx.x == 0 && row == 0 && head == 0 && before >= 0 && x.appended) {
    x.lengths[b * x.length_stride] = static_cast<int32_t>(before + x.sight.block);
  }
  const int64_t splits = before < 0 ? 0 : x.sight.splits(before), state = blockIdx.x * x.splits;
  Compute highest = cache::kNothing<Compute>, total = 0;
  for (int64_t s = 0; s < splits; ++s) highest = cache::higher(x.peak[state + s], highest);
  for (int64_t s = 0; s < splits; ++s) total += x.sum[state + s] * cache::shrinkage(x.peak[state + s], highest);
  // A row that did not fit is marked by NaN, which is 0/0; one that saw nothing is 0.
  if (before >= 0 && total == 0) total = 1;
  for (int64_t d = threadIdx.x; d < x.width; d += kThreads) {
    Compute value = 0;
    for (int64_t s = 0; s < splits; ++s) {
      value += x.accumulator[(state + s) * x.width + d] * cache::shrinkage(x.peak[state + s], highest);
    }
    store(x.out, x.out.at(b, head * x.group + row / x.sight.block, row % x.sight.block, d), value / total);
  }
}

AnyType any_type(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

template <class T>
bool aligned(const cache::Array<T>& x) {
  constexpr auto kBytes = static_cast<int64_t>(kVector<T> * sizeof(T));
  const auto even = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % kBytes == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && even(x.stride[0]) && even(x.stride[1]) &&
         even(x.stride[2]);
}

template <class Stored, class Compute>
void launch_append(const Arguments<Stored, Compute>& x, int64_t batch, Stream stream) {
  const int64_t parts = (x.sight.block + kTokens - 1) / kTokens;
  check(batch * x.heads <= 0x7fffffff && parts <= 0xffff,
        "key has too many rows for one launch: ", batch * x.heads * x.sight.block);
  launch(append_kernel<Stored, Compute>, dim3(static_cast<unsigned>(batch * x.heads), static_cast<unsigned>(parts)),
         dim3(kThreads), 0, stream, x);
}

template <class Stored, class Compute, int kLanes, int kPacks, int kRows>
void launch_split(Arguments<Stored, Compute> x, int64_t batch, Stream stream) {
  x.tiles = (x.group * x.sight.block + kRows - 1) / kRows;
  x.in_split = x.appended && x.tiles == 1;
  const int64_t blocks = batch * x.heads * x.tiles;
  check(blocks <= 0x7fffffff, "query has too many rows for one launch: ", batch * x.heads * x.group * x.sight.block);
  if (x.appended && !x.in_split) launch_append(x, batch, stream);
  launch(attend_split_kernel<Stored, Compute, kLanes, kPacks, kRows>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(x.splits)), dim3(kThreads), 0, stream, x);
}

// Query rows that share one reading of a key fill registers beside it, and a wide key leaves no room for four.
template <int kLanes, class Stored, class Compute>
void launch_rows(const Arguments<Stored, Compute>& x, int64_t batch, Stream stream) {
  if (x.group * x.sight.block == 1) {
    launch_split<Stored, Compute, kLanes, 1, 1>(x, batch, stream);
  } else {
    launch_split<Stored, Compute, kLanes, 1, 4>(x, batch, stream);
  }
}

// As few lanes to a key as a pack each allows, so that a warp has several keys in flight.
template <class Stored, class Compute>
void launch_for_width(const Arguments<Stored, Compute>& x, int64_t batch, Stream stream) {
  constexpr int kPack = kVector<Stored>;
  constexpr int kFewest = kPack >= 8 ? 8 : kPack >= 4 ? 16 : 32;
  if (x.width <= kFewest * kPack) {
    launch_rows<kFewest>(x, batch, stream);
  } else if (kFewest < 16 && x.width <= 16 * kPack) {
    launch_rows < kFewest<16 ? 16 : kFewest>(x, batch, stream);
  } else if (x.width <= 32 * kPack) {
    launch_rows<32>(x, batch, stream);
  } else {
    launch_split<Stored, Compute, 32, kWidest / (32 * kPack), 1>(x, batch, stream);
  }
}

// What both operators hand to their kernels.
template <class Stored, class Compute>
Arguments<Stored, Compute> arguments_of(const Caches& caches, const RotaryTensors& rotary, const OptionalTensor& key,
                                        const OptionalTensor& value, const Tensor& before, int64_t block) {
  Arguments<Stored, Compute> x{};
  if (key) {
    x.new_keys = any_type(*key);
    x.new_values = any_type(*value);
    x.appended = true;
  }
  x.keys = array_of<Stored>(caches.keys);
  x.values = array_of<Stored>(caches.values);
  x.key_scales = scales_of(caches.key_scales);
  x.value_scales = scales_of(caches.value_scales);
  x.layout = layout_of(caches);
  x.sight = {block, caches.window, caches.sinks, kSmallestSplit, true};
  x.rotary = rotary_of<Compute>(rotary);
  x.lengths = static_cast<int32_t*>(caches.lengths.data_ptr());
  x.length_stride = caches.lengths.stride(0);
  x.heads = caches.heads();
  x.width = caches.width();
  x.before = static_cast<int64_t*>(before.data_ptr());
  return x;
}

template <class Stored>
void attend(const Caches& caches, const RotaryTensors& rotary, const OptionalTensor& key, const OptionalTensor& value,
            const Tensor& query, const OptionalTensor& mask, double scale, bool causal, Tensor& out) {
  using Compute = typename arithmetic<Stored>::type;
  const int64_t batch = caches.batch(), heads = caches.heads(), block = query.size(2);
  const int64_t rows = query.size(1) / heads * block, capacity = caches.capacity();
  const Tensor before = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  auto x = arguments_of<Stored, Compute>(caches, rotary, key, value, before, block);
  x.query = any_type(query);
  x.out = any_type(out);
  x.mask = mask_of(mask);
  x.group = query.size(1) / heads;
  x.scale = static_cast<Compute>(scale);
  x.aligned = aligned(x.keys) && aligned(x.values);
  x.sight.causal = causal;
  // The size of a split follows from the cache and the block, never from the batch or the lengths, and so do the bits.
  const int64_t keys = caches.window ? caches.window + block - 1 : capacity;
  x.sight.split = kSmallestSplit * ((keys + kSmallestSplit * kMostSplits - 1) / (kSmallestSplit * kMostSplits));
  if (rows >= kManyRows) x.sight.split = std::max<int64_t>(keys, 1);
  x.splits = x.sight.most_splits(capacity);
  check(x.splits <= 0xffff, "sinks is ", caches.sinks, ", which makes too many splits for one launch");
  const int64_t states = batch * heads * rows * x.splits;
  check(batch * heads * rows <= 0x7fffffff, "query has too many rows for one launch: ", batch * heads * rows);
  const Tensor scratch = torch::stable::new_empty(
      query, {states * (x.width + 2)}, std::is_same_v<Compute, double> ? ScalarType::Double : ScalarType::Float);
  x.peak = static_cast<Compute*>(scratch.data_ptr());
  x.sum = x.peak + states;
  x.accumulator = x.sum + states;
  const OnDevice device(query.get_device_index());
  const Stream stream = device.stream();
  launch_for_width(x, batch, stream);
  launch(merge_splits_kernel<Stored, Compute>, dim3(static_cast<unsigned>(batch * heads * rows)), dim3(kThreads), 0,
         stream, x);
}

Tensor attend_cached(Tensor query, OptionalTensor key, OptionalTensor value, Tensor key_cache, Tensor value_cache,
                     Tensor lengths, double scale, OptionalTensor key_scales, OptionalTensor value_scales,
                     OptionalTensor pages, OptionalTensor mask, OptionalTensor cos, OptionalTensor sin,
                     OptionalTensor positions, bool interleaved, int64_t axes, bool sinks_in_cache, bool causal,
                     int64_t window, int64_t sinks) {
  const Caches caches{key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks};
  const RotaryTensors rotary{cos, sin, positions, interleaved, axes, sinks_in_cache};
  check_attend_cached(query, key, value, caches, mask, rotary);
  check(query.size(3) <= kWidest, "query has width ", query.size(3), ", but expected at most ", kWidest, " on CUDA");
  Tensor out = torch::stable::new_empty(query, query.sizes());
  if (out.numel() == 0) return out;
  for_stored(key_cache.scalar_type(), [&](auto stored) {
    attend<decltype(stored)>(caches, rotary, key, value, query, mask, scale, causal, out);
  });
  return out;
}

void append_cached(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                   OptionalTensor key_scales, OptionalTensor value_scales, OptionalTensor pages, OptionalTensor cos,
                   OptionalTensor sin, OptionalTensor positions, bool interleaved, int64_t axes, int64_t window,
                   int64_t sinks) {
  const Caches caches{key_cache, value_cache, lengths, key_scales, value_scales, pages, window, sinks};
  const RotaryTensors rotary{cos, sin, positions, interleaved, axes};
  check_append_cached(key, value, caches, rotary);
  const int64_t batch = caches.batch(), block = key.size(2);
  if (batch == 0 || block == 0) return;
  const Tensor before = torch::stable::new_empty(key, {batch}, ScalarType::Long);
  const OnDevice device(key.get_device_index());
  const Stream stream = device.stream();
  for_stored(key_cache.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    using Compute = typename arithmetic<Stored>::type;
    launch_append(arguments_of<Stored, Compute>(caches, rotary, key, value, before, block), batch, stream);
  });
  launch(advance_kernel, dim3(static_cast<unsigned>((batch + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
         static_cast<int32_t*>(lengths.data_ptr()), lengths.stride(0), static_cast<const int64_t*>(before.data_ptr()),
         batch, block);
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("attend_cached", TORCH_BOX(&attend_cached));
  library.impl("append_cached", TORCH_BOX(&append_cached));
}

}  // namespace
}  // namespace pygen
