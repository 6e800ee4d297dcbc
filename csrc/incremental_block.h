// The draws of the incremental programs by one CUDA block: from a row of logits, or from the parameters of a pixel's
// discretized mixture of logistics.
#pragma once

#include "block_sampler.h"
#include "incremental.h"
#include "incremental_checks.h"
#include "logistics.h"
#include "simt.h"

namespace pygen::incremental {

// What the blocks of a call share.
template <class T>
struct Advancing {
  Program program;  // on the device
  int64_t n, samples, begin, end;
  T* state;
  int64_t* tokens;
  const T *weights, *conditions, *values;
  int64_t levels;
  const bool* known;  // or nullptr
  const int64_t* sample_ids;
  int64_t id_stride;
  PerRow seeds;
  Advance mode;
  int64_t logistics;
  sampling::RowArguments<T, T> row;
  T *log_prob, *logits;  // logits or nullptr
  T *rows, *scores;      // what is drawn from, (n, vocabulary); scores of the keys, (blocks, warps, keys)
  int64_t keys;          // the most that an operation has
  bool staged;           // whether the weights move to shared memory
};

template <class T>
class BlockDrawer {
 public:
  // Numbers of the workspace, in shared memory.
  static constexpr int kWorkspace = logistics::kDrawArrays * logistics::padded(logistics::kMaxMixtures);

  __device__ __forceinline__ BlockDrawer(const Advancing<T>& all, T* workspace, sampling::Scratch<T>* scratch)
      : all_(all), workspace_(workspace), scratch_(scratch) {}

  // What the call asks for of element `step` of a sample, whose logits or parameters are in the sample's row of
  // all.rows.
  __device__ __forceinline__ void draw_or_score(int64_t row, int64_t step, T* log_prob) {
    const Header& header = all_.program.header;
    const T* const numbers = all_.rows + row * header.vocabulary;
    int64_t* const token = all_.tokens + row * header.steps + step;
    const bool given = all_.known && all_.known[row * header.steps + step];
    if (all_.mode == Advance::kFollow || (all_.mode == Advance::kDraw && given)) {
      if (threadIdx.x == 0) *log_prob = T(0);
    } else if (all_.logistics > 0) {
      draw_logistics(numbers, row, step, token, log_prob);
    } else if (all_.mode == Advance::kScore) {
      score(numbers, *token, log_prob);
    } else {
      draw_logits(row, step, token, log_prob);
    }
  }

 private:
  __device__ __forceinline__ int64_t sample_id(int64_t row) const { return all_.sample_ids[row * all_.id_stride]; }

  __device__ __forceinline__ void draw_logits(int64_t row, int64_t step, int64_t* token, T* log_prob) {
    sampling::BlockSampler<T, T> sampler(all_.row, row, scratch_);
    if (!sampler.find_peak()) {
      if (threadIdx.x == 0) {
        *token = -1;
        *log_prob = std::numeric_limits<T>::quiet_NaN();
      }
    } else if (all_.row.greedy) {
      const int64_t first = sampler.first_of_peak();
      if (threadIdx.x == 0) {
        *token = first;
        *log_prob = T(0);
      }
    } else {
      sampler.filter();
      sampler.draw(sampling::uniform(all_.seeds[row], sample_id(row), step), [&](int64_t drawn, T own) {
        *token = drawn;
        *log_prob = own;
      });
    }
  }

  __device__ __forceinline__ void score(const T* numbers, int64_t token, T* log_prob) const {
    T peak = -std::numeric_limits<T>::infinity();
    for (int64_t i = threadIdx.x; i < all_.program.header.vocabulary; i += blockDim.x) {
      if (numbers[i] > peak || numbers[i] != numbers[i]) peak = numbers[i];
      if (peak != peak) break;
    }
    peak = block_max(peak, scratch_->values);
    double total = 0;
    for (int64_t i = threadIdx.x; i < all_.program.header.vocabulary; i += blockDim.x) {
      total += static_cast<double>(scalar::exp(numbers[i] - peak));
    }
    total = block_sum(total, reinterpret_cast<double*>(scratch_->sums));
    if (threadIdx.x != 0) return;
    *log_prob = token >= 0 && token < all_.program.header.vocabulary
                    ? static_cast<T>(static_cast<double>(numbers[token] - peak) - scalar::log(total))
                    : std::numeric_limits<T>::quiet_NaN();
  }

  // One thread's work: a pixel is a few dozen numbers.
  __device__ __forceinline__ void draw_logistics(const T* numbers, int64_t row, int64_t step, int64_t* token,
                                                 T* log_prob) const {
    if (threadIdx.x != 0) return;
    const int colours = all_.program.header.channels, channel_number = static_cast<int>(step % colours);
    const int levels = static_cast<int>(all_.logistics);
    const int mixtures = static_cast<int>(all_.program.header.vocabulary / logistics::parameter_count(colours, 1));
    const bool drawing = all_.mode == Advance::kDraw;
    T x[3], log_probs[3];
    bool known[3];
    for (int c = 0; c < colours; ++c) {
      known[c] = c < channel_number + (drawing ? 0 : 1);
      if (known[c]) x[c] = static_cast<T>(token[c - channel_number]) * T(2.0 / (levels - 1)) - T(1);
    }
    logistics::draw_pixel(logistics::Pixel<T, T>{numbers, 1, mixtures, colours}, levels,
                          static_cast<uint64_t>(all_.seeds[row]), static_cast<uint64_t>(sample_id(row)),
                          static_cast<uint64_t>(step - channel_number), known, x, log_probs, workspace_);
    const T value = x[channel_number];
    *log_prob = log_probs[channel_number];
    if (!drawing) return;
    *token = value == value && *log_prob == *log_prob
                 ? static_cast<int64_t>(std::rint((value + T(1)) * T(0.5 * (levels - 1))))
                 : -1;
  }

  const Advancing<T>& all_;
  T* workspace_;
  sampling::Scratch<T>* scratch_;
};

}  // namespace pygen::incremental
