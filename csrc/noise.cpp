// Addressed noise on the CPU: whole blocks of four in a loop that the compiler vectorises across blocks, straight into
// the output where it is float32. Built without contraction, so that every clone of the loop gives the same bits.
#include "noise.h"

#include "noise_checks.h"
#include "tensor.h"

namespace pygen {
namespace {

// Elements that one work item takes.
constexpr int64_t kChunk = 16 * kBlock;

template <NoiseStream S>
PYGEN_CLONES void block_rows(uint64_t seed, uint64_t sample_id, uint64_t draw, uint32_t first, int64_t blocks,
                             float* __restrict out) {
  noise_blocks<S, uint32_t>(seed, sample_id, draw, first, blocks, out);
}

#if PYGEN_X86_LEVELS
// AVX-512 wants another source than the clones share; see philox4x32_10.
template <NoiseStream S>
__attribute__((target("arch=x86-64-v4"))) void wide_block_rows(uint64_t seed, uint64_t sample_id, uint64_t draw,
                                                               uint32_t first, int64_t blocks, float* __restrict out) {
  noise_blocks<S, uint64_t>(seed, sample_id, draw, first, blocks, out);
}

template <NoiseStream S>
auto choose_block_rows() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? &wide_block_rows<S> : &block_rows<S>;
}
#else
template <NoiseStream S>
auto choose_block_rows() {
  return &block_rows<S>;
}
#endif

template <NoiseStream S>
void noise_rows(const NoiseAddresses& addresses, int64_t row, int64_t start, int64_t n, float* out) {
  const uint64_t seed = addresses.seed_of(row), sample_id = addresses.sample_id_of(row);
  const uint64_t draw = addresses.draw_of(row);
  const uint32_t first = static_cast<uint32_t>(start / 4);
  const int64_t whole = n / 4;
  static const auto rows_of_blocks = choose_block_rows<S>();
  rows_of_blocks(seed, sample_id, draw, first, whole, out);
  if (n % 4) {
    float values[4];
    noise_block<S>(seed, sample_id, draw, first + static_cast<uint32_t>(whole), values);
    std::copy(values, values + n % 4, out + 4 * whole);
  }
}

template <NoiseStream S>
void noise_compute(const NoiseAddresses& addresses, int64_t rows, int64_t width, Tensor& out) {
  void* const data = out.mutable_data_ptr();
  const ScalarType dtype = out.scalar_type();
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  parallel(rows * chunks, std::min(width, kChunk), [&](int64_t begin, int64_t end) {
    float buffer[kBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / chunks, from = item % chunks * kChunk, to = std::min(width, from + kChunk);
      for (int64_t start = from; start < to; start += kBlock) {
        const int64_t n = std::min(kBlock, to - start), at = row * width + start;
        float* target = block_target(data, dtype, at, buffer);
        noise_rows<S>(addresses, row, start, n, target);
        write_block(data, dtype, at, n, target);
      }
    }
  });
}

Tensor noise(const Tensor& sample_ids, const std::vector<int64_t>& shape, int64_t seed,
             const std::optional<Tensor>& seeds, int64_t draw, const std::optional<Tensor>& draws, ScalarType dtype,
             bool uniform) {
  int64_t width = 0;
  Tensor out = empty_noise(sample_ids, shape, dtype, &width);
  const int64_t rows = sample_ids.size(0);
  const NoiseAddresses addresses = noise_addresses(sample_ids, rows, sample_ids, seed, seeds, draw, draws);
  auto compute = uniform ? &noise_compute<NoiseStream::kUniform> : &noise_compute<NoiseStream::kNormal>;
  compute(addresses, rows, width, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) { library.impl("noise", TORCH_BOX(&noise)); }

}  // namespace

void normal_rows(const NoiseAddresses& addresses, int64_t row, int64_t start, int64_t n, float* out) {
  noise_rows<NoiseStream::kNormal>(addresses, row, start, n, out);
}

}  // namespace pygen
