// The sampler of the discretized mixture of logistics on the CPU.
#include "logistics_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

template <class Stored, class T>
PYGEN_CLONES void draw_rows(const Draws<Stored, T>& draws, int64_t from, int64_t to, T* scratch) {
  for (int64_t row = from; row < to; ++row) draws.draw(row, scratch);
}

std::tuple<Tensor, Tensor> discretized_logistics_sample(const Tensor& parameters, const Tensor& sample_ids,
                                                        int64_t seed, std::optional<Tensor> seeds, int64_t position,
                                                        std::optional<Tensor> positions, int64_t colours,
                                                        int64_t levels, std::optional<Tensor> x,
                                                        std::optional<Tensor> known) {
  return draw_pixels(parameters, sample_ids, seed, seeds, position, positions, colours, levels, x, known,
                     [&]<class Stored, class T>(const Draws<Stored, T>& draws) {
                       parallel(draws.rows, 20 * draws.mixtures * colours, [&](int64_t from, int64_t to) {
                         const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(draws.scratch_size())]);
                         draw_rows(draws, from, to, scratch.get());
                       });
                     });
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("discretized_logistics_sample", TORCH_BOX(&discretized_logistics_sample));
}

}  // namespace
}  // namespace pygen
