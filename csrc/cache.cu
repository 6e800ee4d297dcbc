// Cached attention on CUDA, in two kernels. The first takes one split of the keys for a few query rows of one key/value
// head: lanes that share a key load it 16 bytes each, each such team keeps its own running softmax, and the teams merge
// at the end. The second merges the splits in order (no atomics: results repeat bit for bit). New keys and values are
// read from where they came while one block puts them into the cache, so that the append costs no launch of its own.
#include "cache.h"

#include "cache_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;  // keys that a team has in flight
constexpr int64_t kSmallestSplit = 128;
constexpr int64_t kMostSplits = 128;
constexpr int64_t kWidest = 512;
constexpr int64_t kManyRows = 64;  // from here on query rows alone fill the device, and splits would only cost memory

// (batch, heads, places, width), the last dimension dense.
template <class T>
struct Strided {
  T* data;
  int64_t stride[3];
  __device__ __forceinline__ T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * stride[0] + h * stride[1] + i * stride[2];
  }
};

// Queries come and results go in any floating dtype; they are few beside the keys.
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
  AnyType query, out;
  Strided<Stored> new_keys, new_values, keys, values;
  int32_t* lengths;
  int64_t length_stride;
  int64_t heads, group, block, width, capacity;  // key/value heads; query heads of each; new tokens
  int64_t split, splits, tiles;                  // keys of a split; splits; tiles of query rows
  Compute scale;
  bool aligned;
  // What the first kernel leaves for the second: the lengths before the append (batch,); and for each (batch, head,
  // row) and split the peak, the sum and the accumulator.
  int64_t* before;
  Compute *peak, *sum, *accumulator;
};

// 16 bytes of a row from element e, zeros past its end.
template <class Stored, class Compute>
__device__ __forceinline__ void load_pack(const Stored* row, int64_t e, int64_t width, bool aligned, Compute* to) {
  constexpr int kVector = 16 / sizeof(Stored);
  if (aligned && e + kVector <= width) {
    const auto pack = *reinterpret_cast<const Vector<Stored, kVector>*>(row + e);
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[v] = static_cast<Compute>(pack.values[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[v] = e + v < width ? static_cast<Compute>(row[e + v]) : Compute(0);
  }
}

template <int kLanes, class T>
__device__ __forceinline__ T team_sum(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// A team of kLanes threads shares a key; kPacks packs of 16 bytes per thread cover the width.
template <class Stored, class Compute, int kLanes, int kPacks, int kRows>
__global__ void __launch_bounds__(kThreads) attend_split_kernel(Arguments<Stored, Compute> x) {
  constexpr int kVector = 16 / sizeof(Stored);
  constexpr int kOwn = kPacks * kVector;  // elements of the width that a thread holds
  constexpr int kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, team = threadIdx.x / kLanes, warp = threadIdx.x / 32;

  const int64_t tile = blockIdx.x % x.tiles, head = blockIdx.x / x.tiles % x.heads;
  const int64_t b = blockIdx.x / x.tiles / x.heads, split = blockIdx.y;
  const int64_t before = cache::length_before(x.lengths[b * x.length_stride], x.block, x.capacity);
  if (threadIdx.x == 0 && tile == 0 && head == 0 && split == 0) x.before[b] = before;
  const int64_t begin = split * x.split;
  if (before < 0 || begin >= before + x.block) return;

  if (tile == 0) {
    const int64_t first = max(begin, before), last = min(begin + x.split, before + x.block);
    for (int64_t n = threadIdx.x; n < (last - first) * x.width; n += kThreads) {
      const int64_t slot = first + n / x.width, d = n % x.width;
      x.keys.at(b, head, slot)[d] = x.new_keys.at(b, head, slot - before)[d];
      x.values.at(b, head, slot)[d] = x.new_values.at(b, head, slot - before)[d];
    }
  }

  const int64_t rows = x.group * x.block;
  int64_t seen[kRows], end = begin;
  Compute query[kRows][kOwn], accumulator[kRows][kOwn], peak[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = tile * kRows + r;
    seen[r] = row < rows ? before + row % x.block + 1 : 0;
    end = max(end, min(seen[r], begin + x.split));
    peak[r] = cache::kNothing<Compute>;
    sum[r] = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int64_t d = (e / kVector * kLanes + lane) * kVector + e % kVector;
      query[r][e] =
          row < rows && d < x.width
              ? load<Compute>(x.query, x.query.at(b, head * x.group + row / x.block, row % x.block, d)) * x.scale
              : Compute(0);
      accumulator[r][e] = 0;
    }
  }

  for (int64_t base = begin; base < end; base += kTeams * kBatch) {
    Compute score[kRows][kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t j = base + k * kTeams + team;
      const Stored* row = j >= before ? x.new_keys.at(b, head, j - before) : x.keys.at(b, head, j);
#pragma unroll
      for (int r = 0; r < kRows; ++r) score[r][k] = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        Compute key[kVector];
        load_pack(row, (p * kLanes + lane) * kVector, j < end ? x.width : 0, x.aligned, key);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) score[r][k] += query[r][p * kVector + v] * key[v];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Compute highest = peak[r];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        score[r][k] = team_sum<kLanes>(score[r][k]);
        if (base + k * kTeams + team < seen[r]) highest = cache::higher(score[r][k], highest);
      }
      const Compute shrink = cache::shrinkage(peak[r], highest);
      peak[r] = highest;
      sum[r] *= shrink;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) accumulator[r][e] *= shrink;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        score[r][k] = base + k * kTeams + team < seen[r] ? scalar::exp(score[r][k] - highest) : Compute(0);
        sum[r] += score[r][k];
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t j = base + k * kTeams + team;
      const Stored* row = j >= before ? x.new_values.at(b, head, j - before) : x.values.at(b, head, j);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        Compute value[kVector];
        load_pack(row, (p * kLanes + lane) * kVector, j < end ? x.width : 0, x.aligned, value);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          // Not by a weight of zero: what a row may not see can be infinite.
          if (j < seen[r]) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) accumulator[r][p * kVector + v] += score[r][k] * value[v];
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
        warp_accumulator[warp][r][(e / kVector * kLanes + lane) * kVector + e % kVector] = accumulator[r][e];
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
  const int64_t rows = x.group * x.block, row = blockIdx.x % rows;
  const int64_t head = blockIdx.x / rows % x.heads, b = blockIdx.x / rows / x.heads;
  const int64_t before = x.before[b];
  if (threadIdx.x == 0 && row == 0 && head == 0 && before >= 0) {
    x.lengths[b * x.length_stride] = static_cast<int32_t>(before + x.block);
  }
  const int64_t seen = before < 0 ? 0 : before + row % x.block + 1;
  const int64_t splits = (seen + x.split - 1) / x.split, state = blockIdx.x * x.splits;
  Compute highest = cache::kNothing<Compute>, total = 0;
  for (int64_t s = 0; s < splits; ++s) highest = cache::higher(x.peak[state + s], highest);
  for (int64_t s = 0; s < splits; ++s) total += x.sum[state + s] * cache::shrinkage(x.peak[state + s], highest);
  for (int64_t d = threadIdx.x; d < x.width; d += kThreads) {
    Compute value = 0;
    for (int64_t s = 0; s < splits; ++s) {
      value += x.accumulator[(state + s) * x.width + d] * cache::shrinkage(x.peak[state + s], highest);
    }
    // A row that did not fit has seen nothing: 0/0 is the NaN that marks it.
    store(x.out, x.out.at(b, head * x.group + row / x.block, row % x.block, d), value / total);
  }
}

AnyType any_type(const Tensor& x) {
  return {x.data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

template <class T>
Strided<T> strided(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), {x.stride(0), x.stride(1), x.stride(2)}};
}

template <class T>
bool aligned(const Strided<T>& x) {
  const auto even = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && even(x.stride[0]) && even(x.stride[1]) && even(x.stride[2]);
}

// In the cache's dtype, with a dense last dimension.
Tensor as_stored(const Tensor& x, ScalarType dtype) {
  const Tensor typed = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return typed.stride(3) == 1 ? typed : torch::stable::contiguous(typed);
}

template <class Stored, class Compute, int kLanes, int kPacks, int kRows>
void launch_split(Arguments<Stored, Compute> x, int64_t batch, Stream stream) {
  x.tiles = (x.group * x.block + kRows - 1) / kRows;
  const int64_t blocks = batch * x.heads * x.tiles;
  check(blocks <= 0x7fffffff, "query has too many rows for one launch: ", batch * x.heads * x.group * x.block);
  launch(attend_split_kernel<Stored, Compute, kLanes, kPacks, kRows>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(x.splits)), dim3(kThreads), 0, stream, x);
}

// Query rows that share one reading of a key fill registers beside it, and a wide key leaves no room for four.
template <int kLanes, class Stored, class Compute>
void launch_rows(const Arguments<Stored, Compute>& x, int64_t batch, Stream stream) {
  if (x.group * x.block == 1) {
    launch_split<Stored, Compute, kLanes, 1, 1>(x, batch, stream);
  } else {
    launch_split<Stored, Compute, kLanes, 1, 4>(x, batch, stream);
  }
}

// As few lanes to a key as 16 bytes each allow, so that a warp has several keys in flight.
template <class Stored, class Compute>
void launch_for_width(const Arguments<Stored, Compute>& x, int64_t batch, Stream stream) {
  constexpr int kVector = 16 / sizeof(Stored);
  constexpr int kFewest = kVector >= 8 ? 8 : kVector >= 4 ? 16 : 32;
  if (x.width <= kFewest * kVector) {
    launch_rows<kFewest>(x, batch, stream);
  } else if (kFewest < 16 && x.width <= 16 * kVector) {
    launch_rows < kFewest<16 ? 16 : kFewest>(x, batch, stream);
  } else if (x.width <= 32 * kVector) {
    launch_rows<32>(x, batch, stream);
  } else {
    launch_split<Stored, Compute, 32, kWidest / (32 * kVector), 1>(x, batch, stream);
  }
}

template <class Stored>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
            const Tensor& value_cache, const Tensor& lengths, double scale, Tensor& out) {
  using Compute = typename arithmetic<Stored>::type;
  const Tensor new_keys = as_stored(key, key_cache.scalar_type());
  const Tensor new_values = as_stored(value, key_cache.scalar_type());
  const int64_t batch = query.size(0), heads = key_cache.size(1), capacity = key_cache.size(2);
  const int64_t rows = query.size(1) / heads * query.size(2), width = query.size(3);
  Arguments<Stored, Compute> x{};
  x.query = any_type(query);
  x.out = any_type(out);
  x.new_keys = strided<Stored>(new_keys);
  x.new_values = strided<Stored>(new_values);
  x.keys = strided<Stored>(key_cache);
  x.values = strided<Stored>(value_cache);
  x.lengths = static_cast<int32_t*>(lengths.data_ptr());
  x.length_stride = lengths.stride(0);
  x.heads = heads;
  x.group = query.size(1) / heads;
  x.block = query.size(2);
  x.width = width;
  x.capacity = capacity;
  x.scale = static_cast<Compute>(scale);
  x.aligned = aligned(x.new_keys) && aligned(x.new_values) && aligned(x.keys) && aligned(x.values);
  // The size of a split follows from the cache and the block, never from the batch or the lengths, and so do the bits.
  x.split = kSmallestSplit * ((capacity + kSmallestSplit * kMostSplits - 1) / (kSmallestSplit * kMostSplits));
  if (rows >= kManyRows) x.split = capacity;
  x.splits = (capacity + x.split - 1) / x.split;
  const int64_t states = batch * heads * rows * x.splits;
  check(batch * heads * rows <= 0x7fffffff, "query has too many rows for one launch: ", batch * heads * rows);
  const Tensor before = torch::stable::new_empty(query, {batch}, ScalarType::Long);
  const Tensor scratch = torch::stable::new_empty(
      query, {states * (width + 2)}, std::is_same_v<Compute, double> ? ScalarType::Double : ScalarType::Float);
  x.before = static_cast<int64_t*>(before.data_ptr());
  x.peak = static_cast<Compute*>(scratch.data_ptr());
  x.sum = x.peak + states;
  x.accumulator = x.sum + states;
  const OnDevice device(query.get_device_index());
  const Stream stream = device.stream();
  launch_for_width(x, batch, stream);
  launch(merge_splits_kernel<Stored, Compute>, dim3(static_cast<unsigned>(batch * heads * rows)), dim3(kThreads), 0,
         stream, x);
}

Tensor attend_cached(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                     double scale) {
  check_attend_cached(query, key, value, key_cache, value_cache, lengths);
  check(query.size(3) <= kWidest, "query has width ", query.size(3), ", but expected at most ", kWidest, " on CUDA");
  Tensor out = torch::stable::new_empty(query, query.sizes());
  if (out.numel() == 0) return out;
  for_dtype(key_cache.scalar_type(), [&](auto stored) {
    attend<decltype(stored)>(query, key, value, key_cache, value_cache, lengths, scale, out);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("attend_cached", TORCH_BOX(&attend_cached));
}

}  // namespace
}  // namespace pygen
