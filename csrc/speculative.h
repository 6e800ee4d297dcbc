// One step of speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023,
// arXiv:2302.01318, algorithm 2): a token drafted from q is kept with probability min(1, p / q), and where it is not,
// another is drawn from the positive part of p - q: together that is a draw from p.
//
// Weights are whole numbers, as in sampling.h: p = w_p / W_p, q = w_q / W_q.
#pragma once

#include "sampling.h"

namespace pygen::speculative {

// The two numbers of a drafted token: of the decision, and of the draw in its place. They come from block 1 of the
// token's address; the draft itself was drawn from block 0.
struct Uniforms {
  double accept, replace;
};

PYGEN_INLINE Uniforms uniforms(int64_t seed, int64_t sample_id, int64_t position) {
  const PhiloxWords words = philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(sample_id), NoiseStream::kToken,
                                   static_cast<uint64_t>(position), 1);
  return {uniform53_of_words(words.w0, words.w1), uniform53_of_words(words.w2, words.w3)};
}

PYGEN_INLINE bool accepts(double u, double target_weight, double target_total, double draft_weight,
                          double draft_total) {
  return u * (draft_weight / draft_total) < target_weight / target_total;
}

// The positive part of w_p - w_q W_p / W_q, a whole number no larger than w_p: its sums are exact too.
PYGEN_INLINE double residual(double target_weight, double draft_weight, double ratio) {
  const double rest = target_weight - draft_weight * ratio;
  return rest > 0 ? sampling::round_to_integer(rest) : 0.0;
}

}  // namespace pygen::speculative
