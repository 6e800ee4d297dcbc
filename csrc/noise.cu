// Addressed noise on CUDA: a thread makes the four elements of a block (eight for two-byte outputs) and stores them in
// vectors of 16 bytes where rows are aligned. Built with -fmad=false, so that the bits are those of the CPU.
#include "noise.h"

#include "noise_checks.h"
#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // fills any device a few times over; the kernel strides over the rest

template <NoiseStream S, class Stored>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(NoiseAddresses addresses, int64_t rows, int64_t width, bool aligned, Stored* out) {
  constexpr int N = sizeof(Stored) == 2 ? 8 : 4;
  const int64_t groups = (width + N - 1) / N, total = rows * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < total; item += step) {
    const int64_t row = item / groups, start = item % groups * N;
    float values[N / 4][4];
#pragma unroll
    for (int part = 0; part < N / 4; ++part) {
      noise_block<S>(addresses.seed_of(row), addresses.sample_id_of(row), addresses.draw_of(row),
                     static_cast<uint32_t>(start / 4 + part), values[part]);
    }
    const int count = static_cast<int>(min(static_cast<int64_t>(N), width - start));
    store_vector_as<Stored, N>(out, row * width + start, count, aligned, values[0]);
  }
}

template <NoiseStream S>
void launch_noise(const NoiseAddresses& addresses, int64_t rows, int64_t width, Tensor& out, Stream stream) {
  for_dtype(out.scalar_type(), [&](auto stored) {
    using Stored = decltype(stored);
    constexpr int N = sizeof(Stored) == 2 ? 8 : 4;
    Stored* const data = static_cast<Stored*>(out.mutable_data_ptr());
    const bool aligned = width % N == 0 && vector_aligned(data, out.scalar_type(), N);
    const int64_t items = rows * ((width + N - 1) / N);
    const int64_t blocks = std::min<int64_t>((items + kThreads - 1) / kThreads, kMaxBlocks);
    launch(noise_kernel<S, Stored>, static_cast<unsigned>(blocks), kThreads, 0, stream, addresses, rows, width, aligned,
           data);
  });
}

Tensor noise(const Tensor& sample_ids, const std::vector<int64_t>& shape, int64_t seed,
             const std::optional<Tensor>& seeds, int64_t draw, const std::optional<Tensor>& draws, ScalarType dtype,
             bool uniform) {
  int64_t width = 0;
  Tensor out = empty_noise(sample_ids, shape, dtype, &width);
  const int64_t rows = sample_ids.size(0);
  const NoiseAddresses addresses = noise_addresses(sample_ids, rows, sample_ids, seed, seeds, draw, draws);
  const OnDevice device(sample_ids.get_device_index());
  const Stream stream = device.stream();
  auto run = uniform ? &launch_noise<NoiseStream::kUniform> : &launch_noise<NoiseStream::kNormal>;
  run(addresses, rows, width, out, stream);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) { library.impl("noise", TORCH_BOX(&noise)); }

}  // namespace
}  // namespace pygen
