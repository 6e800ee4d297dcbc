// The draws of the incremental programs on the CPU.
#include "incremental_draw.h"

#include <vector>

#include "logistics.h"
#include "row_sampler.h"

namespace pygen::incremental {
namespace {

template <class T>
class LogitDrawer final : public Drawer<T> {
 public:
  LogitDrawer(int64_t vocabulary, const sampling::Filters& filters)
      : vocabulary_(vocabulary), sampler_(vocabulary, filters) {}

  void draw(const T* row, const int64_t*, int64_t, int64_t seed, int64_t sample_id, int64_t position, int64_t* token,
            T* log_prob) override {
    sampler_.sample(row, [&] { return sampling::uniform(seed, sample_id, position); }, token, log_prob);
  }

  T score(const T* row, const int64_t* pixel, int64_t channel) override {
    const int64_t token = pixel[channel];
    if (token < 0 || token >= vocabulary_) return std::numeric_limits<T>::quiet_NaN();
    T peak = row[0];
    for (int64_t i = 1; i < vocabulary_; ++i) peak = row[i] > peak || row[i] != row[i] ? row[i] : peak;
    double total = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) total += static_cast<double>(scalar::exp(row[i] - peak));
    return static_cast<T>(static_cast<double>(row[token] - peak) - scalar::log(total));
  }

 private:
  int64_t vocabulary_;
  sampling::RowSampler<T> sampler_;
};

template <class T>
class LogisticsDrawer final : public Drawer<T> {
 public:
  LogisticsDrawer(int64_t vocabulary, int64_t channels, int64_t levels)
      : colours_(static_cast<int>(channels)),
        mixtures_(static_cast<int>(vocabulary / logistics::parameter_count(static_cast<int>(channels), 1))),
        levels_(static_cast<int>(levels)),
        scratch_(static_cast<size_t>(logistics::kDrawArrays * logistics::padded(mixtures_))) {}

  void draw(const T* row, const int64_t* pixel, int64_t channel, int64_t seed, int64_t sample_id, int64_t position,
            int64_t* token, T* log_prob) override {
    T x[kColours], log_probs[kColours];
    evaluate(row, pixel, channel, seed, sample_id, position - channel, x, log_probs);
    *log_prob = log_probs[channel];
    *token = x[channel] == x[channel] && log_probs[channel] == log_probs[channel]
                 ? static_cast<int64_t>(std::rint((x[channel] + T(1)) * T(0.5 * (levels_ - 1))))
                 : -1;
  }

  T score(const T* row, const int64_t* pixel, int64_t channel) override {
    T x[kColours], log_probs[kColours];
    evaluate(row, pixel, channel + 1, 0, 0, 0, x, log_probs);
    return log_probs[channel];
  }

 private:
  static constexpr int kColours = 3;

  // The colours of a pixel from `first_unknown` on are drawn.
  void evaluate(const T* row, const int64_t* pixel, int64_t first_unknown, int64_t seed, int64_t sample_id,
                int64_t position, T* x, T* log_probs) {
    bool known[kColours];
    for (int c = 0; c < colours_; ++c) {
      known[c] = c < first_unknown;
      if (known[c]) x[c] = static_cast<T>(pixel[c]) * T(2.0 / (levels_ - 1)) - T(1);
    }
    logistics::draw_pixel(logistics::Pixel<T, T>{row, 1, mixtures_, colours_}, levels_, static_cast<uint64_t>(seed),
                          static_cast<uint64_t>(sample_id), static_cast<uint64_t>(position), known, x, log_probs,
                          scratch_.data());
  }

  int colours_, mixtures_, levels_;
  std::vector<T> scratch_;
};

}  // namespace

template <class T>
std::unique_ptr<Drawer<T>> make_drawer(int64_t vocabulary, int64_t channels, int64_t logistics,
                                       const sampling::Filters& filters) {
  if (logistics > 0) return std::make_unique<LogisticsDrawer<T>>(vocabulary, channels, logistics);
  return std::make_unique<LogitDrawer<T>>(vocabulary, filters);
}

template std::unique_ptr<Drawer<float>> make_drawer(int64_t, int64_t, int64_t, const sampling::Filters&);
template std::unique_ptr<Drawer<double>> make_drawer(int64_t, int64_t, int64_t, const sampling::Filters&);

}  // namespace pygen::incremental
