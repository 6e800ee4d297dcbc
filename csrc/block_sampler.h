// One row of the sampler by one CUDA block, without sorting the vocabulary. A threshold is found digit by digit: the
// weights of the candidates go into bins, and the bin that the target falls into holds the next candidates. Bins are
// filled by atomics on whole numbers, whose sums are the same in any order.
#pragma once

#include "sampling_checks.h"
#include "simt.h"

namespace pygen::sampling {

using Whole = unsigned long long;

constexpr int kMostThreads = 512, kFewestThreads = 128;
constexpr int64_t kPerThread = 16;  // elements of a row that are worth a thread more
constexpr int kBins = 1024;         // of the first round, which cuts the range of the logits evenly
constexpr int kDigitBins = 256;     // of the later rounds, one per value of eight bits of the key
// 34 temperatures below the peak no weight is left, since 2^48 e^-34 rounds to zero.
constexpr double kBinsPerDepth = (kBins - 1) / 34.0;

template <class Stored, class T>
struct RowArguments {
  Grid<Stored> logits;
  int64_t vocabulary;
  bool greedy, split_ties;
  T temperature, margin, scale, bins_per_unit;
  int bits;
  int64_t top_k;
  double top_p, typical_p;
};

template <class Stored, class T>
inline RowArguments<Stored, T> row_arguments(const Grid<Stored>& logits, int64_t vocabulary, const Filters& filters) {
  RowArguments<Stored, T> row{};
  row.logits = logits;
  row.vocabulary = vocabulary;
  row.greedy = filters.temperature == 0;
  row.temperature = usable_temperature<T>(filters.temperature);
  row.margin = min_p_margin<T>(filters.temperature, filters.min_p);
  row.bits = weight_bits(vocabulary);
  row.scale = static_cast<T>(power_of_two(row.bits));
  row.bins_per_unit = usable_temperature<T>(kBinsPerDepth / static_cast<double>(row.temperature));
  row.top_k = filters.top_k;
  row.top_p = filters.top_p;
  row.typical_p = filters.typical_p;
  row.split_ties = filters.split_ties;
  return row;
}

inline unsigned threads_for(int64_t vocabulary) {
  unsigned threads = kFewestThreads;
  while (threads < kMostThreads && threads * kPerThread < vocabulary) threads *= 2;
  return threads;
}

// Keys that ascend as the numbers descend. Adding zero makes one key of both zeros.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ Whole key_of(double x) {
  const Whole bits = static_cast<Whole>(__double_as_longlong(x + 0.0)), sign = 1ull << 63;
  return bits & sign ? bits : ~(bits | sign);
}
__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key : ~key & 0x7fffffffu);
}
__device__ __forceinline__ double number_of(Whole key) {
  const Whole sign = 1ull << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key : ~key & ~sign));
}

// How many bytes of the key can differ: what was widened from 16 bits ends in zeros.
template <class Stored>
constexpr int kKeyBytes = sizeof(Stored);
template <>
constexpr int kKeyBytes<Half> = 3;

struct Found {
  int bin;
  Whole above;  // what lies in earlier bins and rounds
};

template <class T>
struct Scratch {
  Whole bins[kBins];
  Whole sums[32];
  T values[32];
  Found found;
  int first;
};

// The first bin at which `above` and the bins so far reach the target. All threads call and all get the answer.
template <class T>
__device__ __forceinline__ Found find_bin(int count, Whole above, double target, Scratch<T>& scratch) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const Whole* const bins = scratch.bins;
    const int lane = static_cast<int>(threadIdx.x), own = count / 32;
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
      scratch.found = {bin, passed};
    }
  }
  __syncthreads();
  const Found found = scratch.found;
  __syncthreads();
  return found;
}

// The first of n indices whose cumulative amount exceeds u times the whole; one thread calls emit(index, whole). All
// threads of the block call; `sums` is 32 numbers of shared memory.
template <class Amount, class Emit>
__device__ __forceinline__ void draw_whole(int64_t n, double u, const Amount& amount, Whole* sums, const Emit& emit) {
  // Each warp adds up a run of indices; the one in whose run the target falls looks for it.
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t run = (n + warps - 1) / warps, begin = min(n, warp * run), end = min(n, begin + run);
  Whole own = 0;
  for (int64_t i = begin + lane; i < end; i += 32) own += amount(i);
  own = warp_sum(own);
  __syncthreads();
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  Whole passed = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) passed += sums[w];
    total += sums[w];
  }
  const double target = inverse_target(u, static_cast<double>(total));
  if (static_cast<double>(passed) > target || static_cast<double>(passed + own) <= target) return;
  for (int64_t base = begin; base < end; base += 32) {
    Whole upto = base + lane < end ? amount(base + lane) : 0;
    for (int offset = 1; offset < 32; offset *= 2) {
      const Whole lower = __shfl_up_sync(~0u, upto, offset);
      if (lane >= offset) upto += lower;
    }
    const unsigned reached = __ballot_sync(~0u, static_cast<double>(passed + upto) > target);
    if (reached) {
      if (lane == __ffs(static_cast<int>(reached)) - 1) emit(base + lane, total);
      return;
    }
    passed += __shfl_sync(~0u, upto, 31);
  }
}

// All threads of the block call every method, and get the same answers.
template <class Stored, class T>
class BlockSampler {
 public:
  __device__ __forceinline__ BlockSampler(const RowArguments<Stored, T>& all, int64_t number, Scratch<T>* scratch)
      : all_(all),
        data_(all.logits.row(number)),
        n_(all.vocabulary),
        scratch_(*scratch),
        threshold_(-std::numeric_limits<T>::infinity()),
        tie_(std::numeric_limits<T>::quiet_NaN()) {}

  // Whether the row is a distribution: neither NaN nor infinite.
  __device__ __forceinline__ bool find_peak() {
    T peak = -std::numeric_limits<T>::infinity();
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
      const T x = value(i);
      if (x > peak || x != x) peak = x;
      if (peak != peak) break;
    }
    peak_ = block_max(peak, scratch_.values);
    return peak_ - peak_ == T(0);
  }

  __device__ __forceinline__ int64_t first_of_peak() {
    if (threadIdx.x == 0) scratch_.first = 0x7fffffff;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
      if (value(i) == peak_) {
        atomicMin(&scratch_.first, static_cast<int>(i));
        break;
      }
    }
    __syncthreads();
    return scratch_.first;
  }

  __device__ __forceinline__ void filter() {
    Whole above = 0;
    if (all_.top_k < n_) {
      threshold_ = find_threshold<kKeyBytes<Stored>>(
          [this](int64_t i, T* x, T* place) {
            *x = value(i);
            *place = (peak_ - *x) * all_.bins_per_unit;
            return Whole{1};
          },
          static_cast<double>(all_.top_k), &above);
    }
    if (all_.top_p < 1) {
      const double target = all_.top_p * static_cast<double>(kept_weight());
      threshold_ = find_threshold<kKeyBytes<Stored>>(
          [this](int64_t i, T* x, T* place) {
            *x = value(i);
            *place = (peak_ - *x) * all_.bins_per_unit;
            return *x >= threshold_ ? weight(*x) : Whole{0};
          },
          target, &above);
      if (all_.split_ties) split_ties(above, target);
    }
    threshold_ = scalar::at_least(threshold_, peak_ + all_.margin);
    if (all_.typical_p < 1) keep_typical();
  }

  // The token that u falls on; one thread calls emit(token, log-probability).
  template <class Emit>
  __device__ __forceinline__ void draw(double u, const Emit& emit) {
    draw_whole(
        n_, u, [this](int64_t i) { return kept_weight(i); }, scratch_.sums,
        [&](int64_t token, Whole total) { emit(token, log_prob(token, total)); });
  }

  // log p of what is kept, -inf elsewhere.
  __device__ __forceinline__ void write(T* log_probs) {
    const T log_total = static_cast<T>(log_of_total(static_cast<double>(kept_weight()), all_.bits));
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
      const T x = value(i);
      log_probs[i] = holds(i, x) ? (x - peak_) / all_.temperature - log_total : -std::numeric_limits<T>::infinity();
    }
  }

  __device__ __forceinline__ Whole kept_weight(int64_t i) const {
    const T x = value(i);
    return holds(i, x) ? weight(x) : 0;
  }
  // Of all tokens.
  __device__ __forceinline__ Whole kept_weight() {
    Whole total = 0;
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) total += kept_weight(i);
    return block_sum(total, scratch_.sums);
  }
  __device__ __forceinline__ T log_prob(int64_t token, Whole total) const {
    return static_cast<T>(log_share(value(token), peak_, all_.temperature, static_cast<double>(total), all_.bits));
  }

 private:
  __device__ __forceinline__ T value(int64_t i) const { return static_cast<T>(data_[i * all_.logits.stride]); }
  __device__ __forceinline__ Whole weight(T x) const {
    return static_cast<Whole>(weigh(x, peak_, all_.temperature, all_.scale));
  }
  __device__ __forceinline__ bool holds(int64_t i, T x) const {
    if (!(x >= threshold_) || (x == tie_ && i < first_tie_)) return false;
    if (!typical_) return true;
    return weight(x) > 0 && atypicality(x, peak_, all_.temperature, mean_depth_) <= reach_;
  }
  __device__ __forceinline__ void clear_bins(int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) scratch_.bins[i] = 0;
    __syncthreads();
  }

  // The first key such that `above` and the amounts of the elements up to it reach the target, from kBytes bytes of the
  // key down; look(i, &key) gives the amount of an element, 0 for one that does not count.
  template <int kBytes, class Key, class Look>
  __device__ __forceinline__ Key find_key(const Look& look, double target, Whole* above) {
    constexpr int kKeyBits = 8 * sizeof(Key);
    Key prefix = 0;
    for (int digit = 0; digit < kBytes; ++digit) {
      const int shift = kKeyBits - 8 * (digit + 1);
      clear_bins(kDigitBins);
      for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
        Key key;
        const Whole amount = look(i, &key);
        if (!amount || (digit && key >> (shift + 8) != prefix)) continue;
        atomicAdd(&scratch_.bins[static_cast<int>(key >> shift & 0xff)], amount);
      }
      const Found found = find_bin(kDigitBins, *above, target, scratch_);
      *above = found.above;
      prefix = static_cast<Key>(prefix << 8) | static_cast<Key>(found.bin);
    }
    // Below what was looked at, a widened number has zeros: ones in the key of a positive one.
    constexpr int kRest = kKeyBits - 8 * kBytes;
    if constexpr (kRest > 0) {
      prefix = static_cast<Key>(prefix << kRest);
      if (!(prefix >> (kKeyBits - 1))) prefix |= (Key(1) << kRest) - 1;
    }
    return prefix;
  }

  // The largest number such that the elements with one at least as large have amounts that reach the target. look(i,
  // &number, &place) gives the amount, the number, and its place among kBins even bins; what is far down shares the
  // last. `above` becomes the amount of larger numbers.
  template <int kBytes, class Look>
  __device__ __forceinline__ T find_threshold(const Look& look, double target, Whole* above) {
    const auto bin_of = [](T place) { return place < T(kBins - 1) ? static_cast<int>(place) : kBins - 1; };
    clear_bins(kBins);
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
      T x, place;
      const Whole amount = look(i, &x, &place);
      if (amount) atomicAdd(&scratch_.bins[bin_of(place)], amount);
    }
    const Found coarse = find_bin(kBins, 0, target, scratch_);
    *above = coarse.above;
    using Key = decltype(key_of(T{}));
    return number_of(find_key<kBytes, Key>(
        [&](int64_t i, Key* key) {
          T x, place;
          const Whole amount = look(i, &x, &place);
          *key = key_of(x);
          return bin_of(place) == coarse.bin ? amount : Whole{0};
        },
        target, above));
  }

  // Of the elements at the threshold only so many stay as the target takes, the last ones.
  __device__ __forceinline__ void split_ties(Whole above, double target) {
    const Whole own = weight(threshold_);
    if (own == 0) return;
    Whole count =
        static_cast<Whole>(scalar::at_least((target - static_cast<double>(above)) / static_cast<double>(own), 1.0));
    while (count > 1 && static_cast<double>(above + (count - 1) * own) >= target) --count;
    while (static_cast<double>(above + count * own) < target) ++count;
    Whole before = 0;
    const uint32_t key = find_key<4, uint32_t>(
        [this](int64_t i, uint32_t* key) {
          *key = ~static_cast<uint32_t>(i);
          return value(i) == threshold_ ? Whole{1} : Whole{0};
        },
        static_cast<double>(count), &before);
    tie_ = threshold_;
    first_tie_ = static_cast<int64_t>(~key);
  }

  __device__ __forceinline__ void keep_typical() {
    Whole total = 0, depths = 0;
    for (int64_t i = threadIdx.x; i < n_; i += static_cast<int>(blockDim.x)) {
      const T x = value(i);
      if (!holds(i, x)) continue;
      const T own = weigh(x, peak_, all_.temperature, all_.scale);
      total += static_cast<Whole>(own);
      depths += static_cast<Whole>(weighed_depth(own, x, peak_, all_.temperature));
    }
    total = block_sum(total, scratch_.sums);
    depths = block_sum(depths, scratch_.sums);
    mean_depth_ = static_cast<T>(static_cast<double>(depths) / static_cast<double>(total));
    Whole above = 0;
    reach_ = -find_threshold<static_cast<int>(sizeof(T))>(
        [this](int64_t i, T* key, T* place) {
          const T x = value(i), far = atypicality(x, peak_, all_.temperature, mean_depth_);
          *key = -far;
          *place = far * T(kBinsPerDepth);
          return holds(i, x) ? weight(x) : Whole{0};
        },
        all_.typical_p * static_cast<double>(total), &above);
    typical_ = true;
  }

  const RowArguments<Stored, T>& all_;
  const Stored* data_;
  int64_t n_;
  Scratch<T>& scratch_;
  T peak_ = 0, threshold_;
  T tie_;  // elements of this score before first_tie_ are out; NaN for none
  int64_t first_tie_ = 0;
  bool typical_ = false;
  T mean_depth_ = 0, reach_ = 0;  // how far from the typical depth a token may be
};

}  // namespace pygen::sampling
