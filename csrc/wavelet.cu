// Squeezing and the Haar transform on CUDA: one thread a block of 2 x 2. Neighbouring threads take neighbouring blocks
// of a row; where rows lie dense and aligned, a thread moves the two columns of its block at once.
#include "wavelet.h"

#include "simt.h"
#include "tensor.h"
#include "vector.h"
#include "wavelet_checks.h"

namespace pygen {
namespace {

constexpr int kThreads = 256;

struct Strided {
  void* data;
  ScalarType dtype;
  int64_t strides[4];
};

// The picture (n, c, 2 h, 2 w) and its channels (n, 4 c, h, w).
struct WaveletArguments {
  Strided picture, channels;
  int64_t n, c, height, width;  // height and width in blocks
  bool pairs;                   // two columns of the picture are one aligned vector
};

template <class T>
__device__ __forceinline__ void load_pair(const Strided& from, int64_t at, bool pairs, T* to) {
  if (pairs) {
    load_vector<2>(from.data, from.dtype, at, 2, true, to);
  } else {
    load_vector<1>(from.data, from.dtype, at, 1, true, to);
    load_vector<1>(from.data, from.dtype, at + from.strides[3], 1, true, to + 1);
  }
}

template <bool kHaar, bool kInverse, class T>
__global__ void __launch_bounds__(kThreads) wavelet_kernel(WaveletArguments arguments) {
  const int64_t total = arguments.n * arguments.c * arguments.height * arguments.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const Strided &picture = arguments.picture, &channels = arguments.channels;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < total; item += step) {
    const int64_t j = item % arguments.width, rest = item / arguments.width;
    const int64_t i = rest % arguments.height, plane = rest / arguments.height;
    const int64_t channel = plane % arguments.c, sample = plane / arguments.c;
    const int64_t top = sample * picture.strides[0] + channel * picture.strides[1] + 2 * i * picture.strides[2] +
                        2 * j * picture.strides[3];
    const int64_t bottom = top + picture.strides[2];
    const int64_t first = sample * channels.strides[0] + channel * channels.strides[1] + i * channels.strides[2] +
                          j * channels.strides[3];
    const int64_t apart = arguments.c * channels.strides[1];
    if constexpr (kInverse) {
      T values[kCorners];
#pragma unroll
      for (int k = 0; k < kCorners; ++k) {
        load_vector<1>(channels.data, channels.dtype, first + k * apart, 1, true, values + k);
      }
      const Four<T> block = channels_to_block<kHaar>(values[0], values[1], values[2], values[3]);
      // The output is dense, and its rows are even: pairs of columns are aligned.
      const T upper[2] = {block.first, block.second}, lower[2] = {block.third, block.fourth};
      store_vector<2>(picture.data, picture.dtype, top, 2, true, upper);
      store_vector<2>(picture.data, picture.dtype, bottom, 2, true, lower);
    } else {
      T upper[2], lower[2];
      load_pair(picture, top, arguments.pairs, upper);
      load_pair(picture, bottom, arguments.pairs, lower);
      const Four<T> four = block_to_channels<kHaar>(upper[0], upper[1], lower[0], lower[1]);
      const T values[kCorners] = {four.first, four.second, four.third, four.fourth};
#pragma unroll
      for (int k = 0; k < kCorners; ++k) {
        store_vector<1>(channels.data, channels.dtype, first + k * apart, 1, true, values + k);
      }
    }
  }
}

Strided strided(const Tensor& x) {
  return {x.mutable_data_ptr(), x.scalar_type(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

template <bool kInverse>
void launch_wavelet(const Tensor& picture, const Tensor& channels, bool haar) {
  const Strided from = strided(picture);
  bool pairs = from.strides[3] == 1;
  for (int d = 0; d < 3; ++d) pairs = pairs && vector_aligned(from.data, from.dtype, 2, from.strides[d]);
  const WaveletArguments arguments{
      from, strided(channels), picture.size(0), picture.size(1), picture.size(2) / 2, picture.size(3) / 2, pairs};
  const int64_t items = arguments.n * arguments.c * arguments.height * arguments.width;
  // A grid that fills any device a few times over; the kernel strides over the rest.
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, 1 << 16));
  const OnDevice device(picture.get_device_index());
  auto run = [&](auto type) {
    using T = decltype(type);
    launch(haar ? &wavelet_kernel<true, kInverse, T> : &wavelet_kernel<false, kInverse, T>, blocks, kThreads, 0,
           device.stream(), arguments);
  };
  picture.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

Tensor wavelet_forward(const Tensor& x, bool haar) {
  const Tensor y = empty_channels(x);
  launch_wavelet<false>(x, y, haar);
  return y;
}

Tensor wavelet_inverse(const Tensor& y, bool haar) {
  const Tensor x = empty_picture(y);
  launch_wavelet<true>(x, y, haar);
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(PYGEN_CUDA_NAMESPACE, PYGEN_CUDA_KEY, library) {
  library.impl("wavelet_forward", TORCH_BOX(&wavelet_forward));
  library.impl("wavelet_inverse", TORCH_BOX(&wavelet_inverse));
}

}  // namespace
}  // namespace pygen
