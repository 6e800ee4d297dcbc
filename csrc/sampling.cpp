// Sampling from logits on the CPU: one row per work item, no sorting of the vocabulary. A threshold is found by exact
// sums above two guesses taken from a sample of the row, which leaves a few candidates for the next round.
#include "sampling.h"

#include <memory>

#include "sampling_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

constexpr int64_t kBin = 64;       // elements whose maximum is kept: a bin below the threshold is skipped whole
constexpr int64_t kChunk = 1024;   // elements whose kept weight is summed before the draw looks at single ones
constexpr int64_t kFew = 128;      // candidates that are sorted
constexpr int64_t kGuesses = 256;  // elements from which a threshold is guessed
constexpr int64_t kSlack = 16;     // ranks on either side of the guess; a miss costs one more round, never the result

template <class T>
PYGEN_CLONES void widen_rows(const BFloat16* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = scalar::float_of_bfloat16(from[i].x);
}

template <class T>
PYGEN_CLONES void widen_rows(const Half* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = scalar::float_of_half(from[i].x);
}

// Writes the maximum of each bin; returns whether the row has a NaN.
template <class T>
PYGEN_CLONES bool peak_rows(const T* x, int64_t n, T* peaks) {
  bool any = false;
  for (int64_t start = 0; start < n; start += kBin) {
    const int64_t count = std::min(kBin, n - start);
    T peak = -std::numeric_limits<T>::infinity();
    int32_t bad = 0;
#pragma omp simd reduction(max : peak) reduction(| : bad)
    for (int64_t i = 0; i < count; ++i) {
      const T value = x[start + i];
      peak = value > peak ? value : peak;
      bad |= value != value;
    }
    peaks[start / kBin] = peak;
    any |= bad != 0;
  }
  return any;
}

template <class T>
PYGEN_CLONES double weigh_rows(const T* __restrict x, int64_t n, T peak, T temperature, T scale, T* __restrict weight) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const T w = sampling::weigh(x[i], peak, temperature, scale);
    weight[i] = w;
    total += static_cast<double>(w);
  }
  return total;
}

struct Sums {
  double above, from;  // the weight of x > high, and of x >= low
};

template <class T>
PYGEN_CLONES Sums bracket_rows(const T* x, const T* weight, int64_t n, T low, T high) {
  double above = 0, from = 0;
#pragma omp simd reduction(+ : above, from)
  for (int64_t i = 0; i < n; ++i) {
    above += static_cast<double>(x[i] > high ? weight[i] : T(0));
    from += static_cast<double>(x[i] >= low ? weight[i] : T(0));
  }
  return {above, from};
}

template <class T>
PYGEN_CLONES double kept_rows(const T* x, const T* weight, int64_t n, T threshold) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i] >= threshold ? weight[i] : T(0));
  return total;
}

enum class Part { kAbove, kBelow, kBetween };

// The elements above `high`, below `low`, or in [low, high]; `to` may be `x` itself, and to_weight `weight`.
template <Part P, class T>
int64_t gather_rows(const T* x, const T* weight, int64_t n, T low, T high, T* to, T* to_weight) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i];
    to[count] = value;
    to_weight[count] = weight[i];
    if constexpr (P == Part::kAbove) count += value > high;
    if constexpr (P == Part::kBelow) count += value < low;
    if constexpr (P == Part::kBetween) count += (value >= low) & (value <= high);
  }
  return count;
}

template <class T>
class RowSampler {
 public:
  RowSampler(int64_t vocabulary, double temperature, int64_t top_k, double top_p)
      : vocabulary_(vocabulary),
        top_k_(top_k),
        top_p_(top_p),
        greedy_(temperature == 0),
        temperature_(sampling::usable_temperature<T>(temperature)),
        bits_(sampling::weight_bits(vocabulary)),
        scale_(static_cast<T>(sampling::power_of_two(bits_))),
        bins_((vocabulary + kBin - 1) / kBin),
        memory_(std::make_unique_for_overwrite<T[]>(4 * static_cast<size_t>(vocabulary) + 2 * bins_)) {
    copy_ = memory_.get();
    weight_ = copy_ + vocabulary;
    some_ = weight_ + vocabulary;
    some_weight_ = some_ + vocabulary;
    peaks_ = some_weight_ + vocabulary;
    if (top_k < vocabulary) index_ = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(vocabulary));
  }

  // Reads one row; `stride` in elements.
  template <class Stored>
  const T* read(const Stored* row, int64_t stride) {
    if (stride == 1) {
      if constexpr (std::is_same_v<Stored, T>) return row;
      if constexpr (std::is_same_v<Stored, BFloat16> || std::is_same_v<Stored, Half>) {
        widen_rows(row, vocabulary_, copy_);
        return copy_;
      }
    }
    for (int64_t i = 0; i < vocabulary_; ++i) copy_[i] = static_cast<T>(row[i * stride]);
    return copy_;
  }

  void sample(const T* x, int64_t seed, int64_t sample_id, int64_t position, int64_t* token, T* log_prob) {
    const bool bad = peak_rows(x, vocabulary_, peaks_);
    const T peak = *std::max_element(peaks_, peaks_ + bins_);
    if (bad || !std::isfinite(peak)) {
      *token = -1;
      *log_prob = std::numeric_limits<T>::quiet_NaN();
      return;
    }
    if (greedy_) {
      const int64_t bin = std::find(peaks_, peaks_ + bins_, peak) - peaks_;
      *token = std::find(x + bin * kBin, x + vocabulary_, peak) - x;
      *log_prob = 0;
      return;
    }
    int64_t n = vocabulary_;
    const int32_t* index = nullptr;
    if (top_k_ < vocabulary_) {
      n = keep_top_k(x);
      x = copy_;
      index = index_.get();
    }
    const double total = weigh_rows(x, n, peak, temperature_, scale_, weight_);
    T threshold = -std::numeric_limits<T>::infinity();
    if (top_p_ < 1) threshold = find_threshold(x, weight_, n, total, top_p_ * total);
    const int64_t drawn = draw(x, n, threshold, seed, sample_id, position, peak, log_prob);
    *token = index ? index[drawn] : drawn;
  }

 private:
  // The largest value v such that the elements >= v weigh at least `target`.
  T find_threshold(const T* x, const T* weight, int64_t n, double total, double target) {
    double above = 0;  // the weight of what is larger than every candidate
    bool pinch = false;
    while (n > kFew) {
      std::pair<T, T> guesses[kGuesses];
      const int64_t count = std::min(kGuesses, n);
      for (int64_t i = 0; i < count; ++i) guesses[i] = {x[i * n / count], weight[i * n / count]};
      std::sort(guesses, guesses + count);
      // The light end of the row is what a sample estimates well: a few heavy elements may hold most of the weight.
      double spare = (above + total - target) * static_cast<double>(count) / static_cast<double>(n);
      int64_t rank = 0;
      for (; rank < count - 1 && guesses[rank].second <= spare; ++rank) spare -= guesses[rank].second;
      const T low = guesses[pinch ? rank : std::max<int64_t>(0, rank - kSlack)].first;
      const T high = guesses[pinch ? rank : std::min(count - 1, rank + kSlack)].first;
      const Sums sums = bracket_rows(x, weight, n, low, high);
      int64_t left;
      if (above + sums.above >= target) {
        left = gather_rows<Part::kAbove>(x, weight, n, low, high, some_, some_weight_);
        total = sums.above;
      } else if (above + sums.from < target) {
        left = gather_rows<Part::kBelow>(x, weight, n, low, high, some_, some_weight_);
        above += sums.from;
        total -= sums.from;
      } else if (low == high) {
        return low;
      } else {
        left = gather_rows<Part::kBetween>(x, weight, n, low, high, some_, some_weight_);
        above += sums.above;
        total = sums.from - sums.above;
      }
      pinch = left > n / 2;  // a single pivot always leaves fewer candidates, or is the answer
      n = left;
      x = some_;
      weight = some_weight_;
    }
    std::pair<T, T> sorted[kFew];
    for (int64_t i = 0; i < n; ++i) sorted[i] = {x[i], weight[i]};
    std::sort(sorted, sorted + n, [](const auto& a, const auto& b) { return a.first > b.first; });
    int64_t i = 0;
    for (double sum = above; i < n - 1; ++i) {
      sum += sorted[i].second;
      if (sum >= target) break;
    }
    return sorted[i].first;
  }

  // Copies what top-k keeps, ties included, in index order, to copy_ and index_; returns how many.
  int64_t keep_top_k(const T* x) {
    T bound;
    if (top_k_ <= bins_ / 2) {
      // At least top_k elements reach the k-th largest bin maximum, so the k-th largest element does.
      T* order = peaks_ + bins_;
      std::copy(peaks_, peaks_ + bins_, order);
      std::nth_element(order, order + top_k_ - 1, order + bins_, std::greater<T>());
      bound = order[top_k_ - 1];
    } else {
      std::fill(weight_, weight_ + vocabulary_, T(1));
      bound = find_threshold(x, weight_, vocabulary_, static_cast<double>(vocabulary_), static_cast<double>(top_k_));
    }
    int64_t n = 0;
    for (int64_t bin = 0; bin < bins_; ++bin) {
      if (peaks_[bin] < bound) continue;
      const int64_t end = std::min(vocabulary_, (bin + 1) * kBin);
      for (int64_t i = bin * kBin; i < end; ++i) {
        const T value = x[i];
        copy_[n] = value;
        index_[n] = static_cast<int32_t>(i);
        n += value >= bound;
      }
    }
    if (n <= top_k_) return n;
    std::copy(copy_, copy_ + n, some_);
    std::nth_element(some_, some_ + top_k_ - 1, some_ + n, std::greater<T>());
    const T threshold = some_[top_k_ - 1];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T value = copy_[i];
      copy_[kept] = value;
      index_[kept] = index_[i];
      kept += value >= threshold;
    }
    return kept;
  }

  int64_t draw(const T* x, int64_t n, T threshold, int64_t seed, int64_t sample_id, int64_t position, T peak,
               T* log_prob) const {
    double total = 0;
    double sums[kChunk];  // of runs of chunks, as long as it takes for the row to fit
    const int64_t run = ((n + kChunk - 1) / kChunk + kChunk - 1) / kChunk * kChunk;
    const int64_t runs = (n + run - 1) / run;
    for (int64_t i = 0; i < runs; ++i) {
      sums[i] = kept_rows(x + i * run, weight_ + i * run, std::min(run, n - i * run), threshold);
      total += sums[i];
    }
    const double target = sampling::draw_target(seed, sample_id, position, total);
    double passed = 0;
    int64_t i = 0;
    while (i < runs - 1 && passed + sums[i] <= target) passed += sums[i++];
    int64_t drawn = i * run;
    for (;; ++drawn) {
      if (x[drawn] >= threshold) passed += weight_[drawn];
      if (passed > target) break;
    }
    *log_prob = static_cast<T>(sampling::log_share(x[drawn], peak, temperature_, total, bits_));
    return drawn;
  }

  int64_t vocabulary_, top_k_;
  double top_p_;
  bool greedy_;
  T temperature_;
  int bits_;
  T scale_;
  int64_t bins_;
  std::unique_ptr<T[]> memory_;
  std::unique_ptr<int32_t[]> index_;
  T *copy_, *weight_, *some_, *some_weight_, *peaks_;
};

std::tuple<Tensor, Tensor> sample_logits(Tensor logits, Tensor sample_ids, int64_t seed, std::optional<Tensor> seeds,
                                         int64_t position, std::optional<Tensor> positions, double temperature,
                                         int64_t top_k, double top_p) {
  check_sample_logits(logits, sample_ids, temperature, top_k, top_p);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  const PerRow all_seeds = per_row("seed", seeds, seed, logits);
  const PerRow all_positions = per_row("position", positions, position, logits);
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {rows}, sum_dtype(logits));
  const int64_t* ids = static_cast<const int64_t*>(sample_ids.data_ptr());
  const int64_t id_stride = sample_ids.stride(0);
  for_dtype(logits.scalar_type(), [&](auto zero) {
    using Stored = decltype(zero);
    using T = typename arithmetic<Stored>::type;
    const auto* data = static_cast<const Stored*>(logits.data_ptr());
    parallel(rows, vocabulary + 200, [&](int64_t from, int64_t to) {
      RowSampler<T> sampler(vocabulary, temperature, top_k, top_p);
      for (int64_t row = from; row < to; ++row) {
        const T* x = sampler.read(data + row * logits.stride(0), logits.stride(1));
        sampler.sample(x, all_seeds[row], ids[row * id_stride], all_positions[row],
                       static_cast<int64_t*>(token.data_ptr()) + row, static_cast<T*>(log_prob.data_ptr()) + row);
      }
    });
  });
  return {token, log_prob};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) { library.impl("sample_logits", TORCH_BOX(&pygen::sample_logits)); }
