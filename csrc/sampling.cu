// Sampling from logits on CUDA: one block per row, no sorting of the vocabulary. A threshold is found digit by digit:
// the weights of the candidates go into bins, and the bin that the target falls into holds the next candidates. Bins
// are filled by atomics on whole numbers, whose sums are the same in any order.
#include "sampling.h"

#include "sampling_checks.h"
#include "simt.h"
#include "tensor.h"

namespace pygen {
namespace {

using Whole = unsigned long long;

constexpr int kMostThreads = 512, kFewestThreads = 128;
constexpr int64_t kPerThread = 16;  // elements of a row that are worth a thread more
constexpr int kBins = 1024;         // of the first round, which cuts the range of the logits evenly
constexpr int kDigitBins = 256;     // of the later rounds, one per value of eight bits of the key

template <class Stored, class T>
struct Arguments {
  const Stored* logits;
  int64_t row_stride, stride, vocabulary;
  PerRow seeds, positions;
  const int64_t* sample_ids;
  int64_t id_stride;
  bool greedy;
  T temperature, scale, bins_per_unit;
  int bits;
  int64_t top_k;
  double top_p;
  int64_t* token;
  T* log_prob;
};

// Keys that ascend as the logits descend.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ Whole key_of(double x) {
  const Whole bits = static_cast<Whole>(__double_as_longlong(x)), sign = 1ull << 63;
  return bits & sign ? bits : ~(bits | sign);
}
__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu);
}
__device__ __forceinline__ double logit_of(Whole key) {
  const Whole sign = 1ull << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key : ~key & ~sign));
}

// How many bytes of the key can differ: what was widened from 16 bits ends in zeros.
template <class Stored>
constexpr int kKeyBytes = sizeof(Stored);
template <>
constexpr int kKeyBytes<Half> = 3;

template <class Stored, class T>
struct Row {
  const Arguments<Stored, T>& all;
  const Stored* data;
  T peak;
  __device__ __forceinline__ T operator[](int64_t i) const { return static_cast<T>(data[i * all.stride]); }
  __device__ __forceinline__ T weight(T x) const { return sampling::weigh(x, peak, all.temperature, all.scale); }
  // Distance below the peak in even steps; what is far below shares the last bin.
  __device__ __forceinline__ int bin(T x) const {
    const T distance = (peak - x) * all.bins_per_unit;
    return distance < T(kBins - 1) ? static_cast<int>(distance) : kBins - 1;
  }
};

// One for each element (top-k) or its weight (top-p).
struct Count {
  template <class Stored, class T>
  __device__ __forceinline__ Whole operator()(const Row<Stored, T>&, T) const {
    return 1;
  }
};
struct Weight {
  template <class Stored, class T>
  __device__ __forceinline__ Whole operator()(const Row<Stored, T>& row, T x) const {
    return static_cast<Whole>(row.weight(x));
  }
};

struct Found {
  int bin;
  Whole above;  // what lies in earlier bins and rounds
};

// The first bin at which `above` and the bins so far reach the target. All threads call and all get the answer.
__device__ __forceinline__ Found find_bin(const Whole* bins, int count, Whole above, double target, Found* shared) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, own = count / 32;
    Whole sum = 0;
    for (int i = 0; i < own; ++i) sum += bins[lane * own + i];
    Whole upto = sum;
    for (int offset = 1; offset < 32; offset *= 2) {
      const Whole lower = __shfl_up_sync(~0u, upto, offset);
      if (lane >= offset) upto += lower;
    }
    const unsigned reached = __ballot_sync(~0u, static_cast<double>(above + upto) >= target);
    // The target is at most the whole, so some lane reaches it; the last one, should rounding say otherwise.
    const int first = reached ? __ffs(static_cast<int>(reached)) - 1 : 31;
    if (lane == first) {
      Whole passed = above + upto - sum;
      int bin = lane * own;
      for (; bin < lane * own + own - 1; ++bin) {
        if (static_cast<double>(passed + bins[bin]) >= target) break;
        passed += bins[bin];
      }
      *shared = {bin, passed};
    }
  }
  __syncthreads();
  const Found found = *shared;
  __syncthreads();
  return found;
}

// The largest value v such that the elements >= v, of those >= `floor`, measure at least `target`.
template <class Measure, class Stored, class T>
__device__ T find_threshold(const Row<Stored, T>& row, T floor, double target, Measure measure, Whole* bins,
                            Found* shared) {
  const int64_t n = row.all.vocabulary;
  for (int i = threadIdx.x; i < kBins; i += static_cast<int>(blockDim.x)) bins[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
    const T x = row[i];
    if (x >= floor) {
      const Whole amount = measure(row, x);
      if (amount) atomicAdd(&bins[row.bin(x)], amount);
    }
  }
  Found found = find_bin(bins, kBins, 0, target, shared);
  const int coarse = found.bin;

  using Key = decltype(key_of(T{}));
  constexpr int kKeyBits = 8 * sizeof(Key);
  Key prefix = 0;
  for (int digit = 0; digit < kKeyBytes<Stored>; ++digit) {
    const int shift = kKeyBits - 8 * (digit + 1);
    for (int i = threadIdx.x; i < kDigitBins; i += static_cast<int>(blockDim.x)) bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      const T x = row[i];
      if (x < floor || row.bin(x) != coarse) continue;
      const Key key = key_of(x);
      if (digit && key >> (shift + 8) != prefix) continue;
      const Whole amount = measure(row, x);
      if (amount) atomicAdd(&bins[static_cast<int>(key >> shift & 0xff)], amount);
    }
    found = find_bin(bins, kDigitBins, found.above, target, shared);
    prefix = static_cast<Key>(prefix << 8) | static_cast<Key>(found.bin);
  }
  // Below what was looked at, a widened logit has zeros: ones in the key of a positive number.
  constexpr int kRest = kKeyBits - 8 * kKeyBytes<Stored>;
  if constexpr (kRest > 0) {
    const Key rest = (Key(1) << kRest) - 1;
    prefix = static_cast<Key>(prefix << kRest);
    if (!(prefix >> (kKeyBits - 1))) prefix |= rest;
  }
  return logit_of(prefix);
}

template <class Stored, class T>
__global__ void __launch_bounds__(kMostThreads) sample_kernel(Arguments<Stored, T> all) {
  SHARED(Whole, bins, [kBins]);
  SHARED(Found, found, [1]);
  SHARED(T, scratch, [32]);
  SHARED(Whole, sums, [32]);
  SHARED(int, first, [1]);
  const int64_t number = blockIdx.x, n = all.vocabulary;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Row<Stored, T> row{all, all.logits + number * all.row_stride, T(0)};

  T peak = -std::numeric_limits<T>::infinity();
  for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
    const T x = row[i];
    if (x > peak || x != x) peak = x;
    if (peak != peak) break;
  }
  row.peak = peak = block_max(peak, scratch);
  if (!(peak - peak == T(0))) {  // NaN or infinite: not a distribution
    if (threadIdx.x == 0) {
      all.token[number] = -1;
      all.log_prob[number] = std::numeric_limits<T>::quiet_NaN();
    }
    return;
  }
  if (all.greedy) {
    if (threadIdx.x == 0) first[0] = 0x7fffffff;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      if (row[i] == peak) {
        atomicMin(&first[0], static_cast<int>(i));
        break;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      all.token[number] = first[0];
      all.log_prob[number] = 0;
    }
    return;
  }

  T threshold = -std::numeric_limits<T>::infinity();
  if (all.top_k < n) {
    threshold = find_threshold(row, threshold, static_cast<double>(all.top_k), Count(), bins, found);
  }
  if (all.top_p < 1) {
    Whole total = 0;
    for (int64_t i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      const T x = row[i];
      if (x >= threshold) total += static_cast<Whole>(row.weight(x));
    }
    total = block_sum(total, sums);
    threshold = find_threshold(row, threshold, all.top_p * static_cast<double>(total), Weight(), bins, found);
  }

  // Each warp weighs a run of the row; the one in whose run the target falls looks for the token.
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t run = (n + warps - 1) / warps, begin = min(n, warp * run), end = min(n, begin + run);
  Whole own = 0;
  for (int64_t i = begin + lane; i < end; i += 32) {
    const T x = row[i];
    if (x >= threshold) own += static_cast<Whole>(row.weight(x));
  }
  own = warp_sum(own);
  __syncthreads();
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  Whole passed = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) passed += sums[w];
    total += sums[w];
  }
  const double target = sampling::draw_target(all.seeds[number], all.sample_ids[number * all.id_stride],
                                              all.positions[number], static_cast<double>(total));
  if (static_cast<double>(passed) > target || static_cast<double>(passed + own) <= target) return;
  for (int64_t base = begin; base < end; base += 32) {
    const T x = base + lane < end ? row[base + lane] : T(0);
    const Whole weight = base + lane < end && x >= threshold ? static_cast<Whole>(row.weight(x)) : 0;
    Whole upto = weight;
    for (int offset = 1; offset < 32; offset *= 2) {
      const Whole lower = __shfl_up_sync(~0u, upto, offset);
      if (lane >= offset) upto += lower;
    }
    const unsigned reached = __ballot_sync(~0u, static_cast<double>(passed + upto) > target);
    if (reached) {
      if (lane == __ffs(static_cast<int>(reached)) - 1) {
        all.token[number] = base + lane;
        all.log_prob[number] =
            static_cast<T>(sampling::log_share(x, peak, all.temperature, static_cast<double>(total), all.bits));
      }
      return;
    }
    passed += __shfl_sync(~0u, upto, 31);
  }
}

std::tuple<Tensor, Tensor> sample_logits(Tensor logits, Tensor sample_ids, int64_t seed, std::optional<Tensor> seeds,
                                         int64_t position, std::optional<Tensor> positions, double temperature,
                                         int64_t top_k, double top_p) {
  check_sample_logits(logits, sample_ids, temperature, top_k, top_p);
  const int64_t rows = logits.size(0);
  check(rows <= 0x7fffffff, "logits has too many rows for one launch: ", rows);
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {rows}, sum_dtype(logits));
  for_dtype(logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    Arguments<Stored, T> all{};
    all.logits = static_cast<const Stored*>(logits.data_ptr());
    all.row_stride = logits.stride(0);
    all.stride = logits.stride(1);
    all.vocabulary = logits.size(1);
    all.seeds = per_row("seed", seeds, seed, logits);
    all.positions = per_row("position", positions, position, logits);
    all.sample_ids = static_cast<const int64_t*>(sample_ids.data_ptr());
    all.id_stride = sample_ids.stride(0);
    all.greedy = temperature == 0;
    all.temperature = sampling::usable_temperature<T>(temperature);
    all.bits = sampling::weight_bits(logits.size(1));
    all.scale = static_cast<T>(sampling::power_of_two(all.bits));
    // 34 temperatures below the peak no weight is left, since 2^48 e^-34 rounds to zero.
    all.bins_per_unit = sampling::usable_temperature<T>((kBins - 1) / (34.0 * static_cast<double>(all.temperature)));
    all.top_k = top_k;
    all.top_p = top_p;
    all.token = static_cast<int64_t*>(token.data_ptr());
    all.log_prob = static_cast<T*>(log_prob.data_ptr());
    unsigned threads = kFewestThreads;
    while (threads < kMostThreads && threads * kPerThread < all.vocabulary) threads *= 2;
    const OnDevice device(logits.get_device_index());
    launch(sample_kernel<Stored, T>, dim3(static_cast<unsigned>(rows)), dim3(threads), 0, device.stream(), all);
  });
  return {token, log_prob};
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("sample_logits", TORCH_BOX(&sample_logits));
}

}  // namespace
}  // namespace pygen
