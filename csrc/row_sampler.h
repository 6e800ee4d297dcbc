// One row of the sampler on the CPU, without sorting the vocabulary. A threshold is found by exact sums above two
// guesses taken from a sample of the row, which leaves a few candidates for the next round.
#pragma once

#include <functional>
#include <memory>

#include "sampling_checks.h"
#include "sampling_rows.h"

namespace pygen::sampling {
namespace {  // as in sampling_rows.h

constexpr int64_t kChunk = 1024;   // elements whose kept weight is summed before the draw looks at single ones
constexpr int64_t kFew = 128;      // candidates that are sorted
constexpr int64_t kGuesses = 256;  // elements from which a threshold is guessed
constexpr int64_t kSlack = 16;     // ranks on either side of the guess; a miss costs one more round, never the result
// Bins of distances from the typical depth, of which 34 cover all that has weight.
constexpr int kTypicalBins = 1024;
constexpr double kBinsPerDepth = (kTypicalBins - 1) / 34.0;

// What is left of a row: the elements whose key reaches the threshold, but for ties that were split.
template <class T>
struct Kept {
  const T *x, *key;      // of n elements, and what they are kept by: x itself, or its typicality
  const int32_t* index;  // their tokens; null where these are 0 .. n-1
  int64_t n;
  T threshold, peak;
  T tie;  // elements of this x before `first_tie` are out; NaN for none
  int64_t first_tie;

  bool holds(int64_t i) const { return key[i] >= threshold && !(x[i] == tie && i < first_tie); }
  int64_t token(int64_t i) const { return index ? index[i] : i; }
};

template <class T>
class RowSampler {
 public:
  RowSampler(int64_t vocabulary, const Filters& filters)
      : vocabulary_(vocabulary),
        filters_(filters),
        temperature_(usable_temperature<T>(filters.temperature)),
        margin_(min_p_margin<T>(filters.temperature, filters.min_p)),
        bits_(weight_bits(vocabulary)),
        scale_(static_cast<T>(power_of_two(bits_))),
        bins_((vocabulary + kBin - 1) / kBin),
        memory_(std::make_unique_for_overwrite<T[]>(kArrays * static_cast<size_t>(vocabulary) + 2 * bins_)) {
    T** const arrays[kArrays] = {&copy_, &weight_, &some_, &some_weight_, &key_};
    for (size_t i = 0; i < kArrays; ++i) *arrays[i] = memory_.get() + i * static_cast<size_t>(vocabulary);
    peaks_ = memory_.get() + kArrays * static_cast<size_t>(vocabulary);
    if (filters.top_k < vocabulary) index_ = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(vocabulary));
  }

  // One row of logits; `stride` in elements.
  template <class Stored>
  const T* read(const Stored* row, int64_t stride) {
    return read(row, stride, copy_);
  }

  // The scores of a row: guided, penalized and masked logits.
  template <class Stored>
  const T* read(const Sources<Stored>& sources, int64_t number) {
    const Stored* const row = sources.logits.row(number);
    const T* x = read(row, sources.logits.stride);
    if (sources.plain()) return x;
    T log_total = 0, log_total_without = 0, peak = 0, peak_without = 0;
    const T guidance = static_cast<T>(filters_.guidance_scale);
    const T penalty = static_cast<T>(filters_.repetition_penalty);
    const Stored* const without = sources.unconditional.row(number);
    if (sources.guided) {
      const T* u = read(without, sources.unconditional.stride, some_);
      if (sources.normalized()) {
        find_total(x, &peak, &log_total);
        find_total(u, &peak_without, &log_total_without);
        if (x != copy_) std::copy(x, x + vocabulary_, copy_);
        if (u != some_) std::copy(u, u + vocabulary_, some_);
        normalize_rows(copy_, vocabulary_, peak, log_total);
        normalize_rows(some_, vocabulary_, peak_without, log_total_without);
        x = copy_;
        u = some_;
      }
      guide_rows(x, u, vocabulary_, guidance, copy_);
    } else if (x != copy_) {
      std::copy(x, x + vocabulary_, copy_);
    }
    if (sources.penalized) {
      // From the logits once more, because an id that comes twice is penalized once.
      const auto score = [&](int64_t i) {
        const T c = static_cast<T>(row[i * sources.logits.stride]);
        if (!sources.guided) return c;
        const T u = static_cast<T>(without[i * sources.unconditional.stride]);
        return guide(normalize(c, peak, log_total), normalize(u, peak_without, log_total_without), guidance);
      };
      const int64_t* const ids = sources.history.row(number);
      for (int64_t i = 0; i < sources.history.columns; ++i) {
        const int64_t id = ids[i * sources.history.stride];
        if (id >= 0 && id < vocabulary_) copy_[id] = penalize(score(id), penalty);
      }
    }
    if (sources.masked) {
      const bool* const allowed = sources.allowed.row(number);
      const int64_t stride = sources.allowed.stride;
      for (int64_t i = 0; i < vocabulary_; ++i) {
        copy_[i] = allowed[i * stride] ? copy_[i] : -std::numeric_limits<T>::infinity();
      }
    }
    return copy_;
  }

  // Draws by u(): the next uniform number is asked for only where there is something to draw.
  template <class Uniform>
  void sample(const T* x, const Uniform& uniform, int64_t* token, T* log_prob) {
    const T peak = find_peak(x);
    if (!std::isfinite(peak)) {
      *token = -1;
      *log_prob = std::numeric_limits<T>::quiet_NaN();
    } else if (filters_.temperature == 0) {
      *token = first_of(x, peak);
      *log_prob = 0;
    } else {
      const Kept<T> kept = filter(x, peak);
      *token = kept.token(draw(kept, uniform(), log_prob));
    }
  }

  // log p of what is kept, -inf elsewhere; NaN for a row that is no distribution.
  void write(const T* x, T* log_probs) {
    const T peak = find_peak(x);
    const bool valid = std::isfinite(peak), greedy = filters_.temperature == 0;
    std::fill(log_probs, log_probs + vocabulary_,
              valid ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN());
    if (!valid) return;
    if (greedy) {
      log_probs[first_of(x, peak)] = 0;
      return;
    }
    const Kept<T> kept = filter(x, peak);
    const double total = kept_rows(kept.key, weight_, kept.n, kept.threshold);
    const T log_total = static_cast<T>(log_of_total(total, bits_));
    for (int64_t i = 0; i < kept.n; ++i) {
      if (kept.holds(i)) log_probs[kept.token(i)] = (kept.x[i] - peak) / temperature_ - log_total;
    }
  }

  // The weights of a row without any filter, as many as the vocabulary, and their sum: zero for a row that is no
  // distribution.
  double weigh(const T* x, T* weight, T* peak) {
    *peak = find_peak(x);
    return std::isfinite(*peak) ? weigh_rows(x, vocabulary_, *peak, T(1), scale_, weight) : 0.0;
  }

 private:
  static constexpr size_t kArrays = 5;

  template <class Stored>
  const T* read(const Stored* row, int64_t stride, T* buffer) const {
    if constexpr (std::is_same_v<Stored, T>) {
      if (stride == 1) return row;
    }
    copy_strided(row, stride, vocabulary_, buffer);
    return buffer;
  }

  // NaN where the row has one.
  T find_peak(const T* x) {
    const bool bad = peak_rows(x, vocabulary_, peaks_);
    return bad ? std::numeric_limits<T>::quiet_NaN() : *std::max_element(peaks_, peaks_ + bins_);
  }

  int64_t first_of(const T* x, T peak) const {
    const int64_t bin = std::find(peaks_, peaks_ + bins_, peak) - peaks_;
    return std::find(x + bin * kBin, x + vocabulary_, peak) - x;
  }

  void find_total(const T* x, T* peak, T* log_total) {
    *peak = find_peak(x);
    const double total = weigh_rows(x, vocabulary_, *peak, T(1), scale_, weight_);
    *log_total = static_cast<T>(log_of_total(total, bits_));
  }

  Kept<T> filter(const T* x, T peak) {
    Kept<T> kept{
        x, x, nullptr, vocabulary_, -std::numeric_limits<T>::infinity(), peak, std::numeric_limits<T>::quiet_NaN(), 0};
    if (filters_.top_k < vocabulary_) {
      kept.n = keep_top_k(x);
      kept.x = kept.key = copy_;
      kept.index = index_.get();
    }
    double total = weigh_runs(kept.x, kept.n, peak);
    if (filters_.top_p < 1) {
      const double target = filters_.top_p * total;
      kept.threshold = find_threshold(kept.x, weight_, kept.n, 0, total, target);
      if (filters_.split_ties) split_ties(target, &kept);
    }
    kept.threshold = std::max(kept.threshold, peak + margin_);
    if (filters_.typical_p < 1) {
      const double depths = depth_rows(kept.x, kept.n, kept.threshold, peak, temperature_, weight_);
      total = kept_rows(kept.x, weight_, kept.n, kept.threshold);
      typicality_rows(kept.x, weight_, kept.n, peak, temperature_, static_cast<T>(depths / total), key_);
      kept.key = key_;
      kept.threshold = find_reach(kept.n, filters_.typical_p * total);
    }
    return kept;
  }

  // Of the elements at the threshold only so many stay as the target takes, the last ones.
  void split_ties(double target, Kept<T>* kept) {
    double sum = bracket_rows(kept->x, weight_, kept->n, kept->threshold, kept->threshold).above;
    int64_t first = -1;
    for (int64_t i = kept->n - 1; i >= 0; --i) {
      if (kept->x[i] != kept->threshold) continue;
      if (sum >= target) {
        weight_[i] = 0;
        continue;
      }
      sum += static_cast<double>(weight_[i]);
      first = i;
    }
    kept->tie = kept->threshold;
    kept->first_tie = first;
  }

  // The same as find_threshold for the typicalities in key_: a sample says little of where their weight is, so bins of
  // even width narrow them down first.
  T find_reach(int64_t n, double target) {
    double bins[kTypicalBins] = {};
    const auto bin_of = [this](int64_t i) {
      const T place = -key_[i] * T(kBinsPerDepth);
      return place < T(kTypicalBins - 1) ? static_cast<int>(place) : kTypicalBins - 1;
    };
    for (int64_t i = 0; i < n; ++i) bins[bin_of(i)] += static_cast<double>(weight_[i]);
    double above = 0;
    int bin = 0;
    for (; bin < kTypicalBins - 1 && above + bins[bin] < target; ++bin) above += bins[bin];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      some_[left] = key_[i];
      some_weight_[left] = weight_[i];
      left += bin_of(i) == bin;
    }
    return find_threshold(some_, some_weight_, left, above, bins[bin], target);
  }

  // The largest value v such that the elements >= v weigh at least `target`, given what larger ones weigh that are not
  // among these.
  T find_threshold(const T* x, const T* weight, int64_t n, double above, double total, double target) {
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
    const int64_t top_k = filters_.top_k;
    T bound;
    if (top_k <= bins_ / 2) {
      // At least top_k elements reach the k-th largest bin maximum, so the k-th largest element does.
      T* order = peaks_ + bins_;
      std::copy(peaks_, peaks_ + bins_, order);
      std::nth_element(order, order + top_k - 1, order + bins_, std::greater<T>());
      bound = order[top_k - 1];
    } else {
      std::fill(weight_, weight_ + vocabulary_, T(1));
      bound = find_threshold(x, weight_, vocabulary_, 0, static_cast<double>(vocabulary_), static_cast<double>(top_k));
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
    if (n <= top_k) return n;
    std::copy(copy_, copy_ + n, some_);
    std::nth_element(some_, some_ + top_k - 1, some_ + n, std::greater<T>());
    const T threshold = some_[top_k - 1];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T value = copy_[i];
      copy_[kept] = value;
      index_[kept] = index_[i];
      kept += value >= threshold;
    }
    return kept;
  }

  // Weighs n elements; the sums of their runs stay in sums_.
  double weigh_runs(const T* x, int64_t n, T peak) {
    double total = 0;
    const int64_t run = run_of(n);
    for (int64_t i = 0; i * run < n; ++i) {
      const int64_t start = i * run, count = std::min(run, n - start);
      sums_[i] = weigh_rows(x + start, count, peak, temperature_, scale_, weight_ + start);
      total += sums_[i];
    }
    return total;
  }

  // Whole chunks, as many as it takes for the runs to fit in sums_.
  static int64_t run_of(int64_t n) { return ((n + kChunk - 1) / kChunk + kChunk - 1) / kChunk * kChunk; }

  int64_t draw(const Kept<T>& kept, double u, T* log_prob) {
    double total = 0;
    const int64_t n = kept.n, run = run_of(n), runs = (n + run - 1) / run;
    const bool all = kept.threshold == -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t start = i * run;
      if (!all) sums_[i] = kept_rows(kept.key + start, weight_ + start, std::min(run, n - start), kept.threshold);
      total += sums_[i];
    }
    const double target = inverse_target(u, total);
    double passed = 0;
    int64_t i = 0;
    while (i < runs - 1 && passed + sums_[i] <= target) passed += sums_[i++];
    int64_t drawn = i * run;
    for (;; ++drawn) {
      if (kept.key[drawn] >= kept.threshold) passed += weight_[drawn];
      if (passed > target) break;
    }
    *log_prob = static_cast<T>(log_share(kept.x[drawn], kept.peak, temperature_, total, bits_));
    return drawn;
  }

  int64_t vocabulary_;
  Filters filters_;
  T temperature_, margin_;
  int bits_;
  T scale_;
  int64_t bins_;
  std::unique_ptr<T[]> memory_;
  std::unique_ptr<int32_t[]> index_;
  T *copy_, *weight_, *some_, *some_weight_, *key_, *peaks_;
  double sums_[kChunk];
};

}  // namespace
}  // namespace pygen::sampling
