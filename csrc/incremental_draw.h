// What an element of a sample is drawn from in the incremental programs: a row of logits, or the parameters of a
// pixel's discretized mixture of logistics. Apart from the products, because tokens are to be the same bits as those of
// ops.sample_logits and ops.sample_discretized_logistics, which are compiled without contraction.
#pragma once

#include <cstdint>
#include <memory>

#include "sampling.h"

namespace pygen::incremental {

// Of one thread. `row` is what the program computed for the element; pixel: the tokens of its site, of which those of
// the channels before are there. Tokens of logistics are levels.
template <class T>
class Drawer {
 public:
  virtual ~Drawer() = default;
  // The next token, -1 where the row is no distribution, and its log-probability in nats.
  virtual void draw(const T* row, const int64_t* pixel, int64_t channel, int64_t seed, int64_t sample_id,
                    int64_t position, int64_t* token, T* log_prob) = 0;
  // The log-probability of the token that is there.
  virtual T score(const T* row, const int64_t* pixel, int64_t channel) = 0;
};

// logistics: the number of levels, 0 for logits.
template <class T>
std::unique_ptr<Drawer<T>> make_drawer(int64_t vocabulary, int64_t channels, int64_t logistics,
                                       const sampling::Filters& filters);

}  // namespace pygen::incremental
