// Squeezing and the Haar transform on the CPU: strips of whole rows, their even and odd columns taken apart in one loop
// over the strip and joined to blocks in another, so that short rows vectorise too.
#include "wavelet.h"

#include <memory>

#include "tensor.h"
#include "wavelet_checks.h"

namespace pygen {
namespace {

template <class T>
PYGEN_CLONES void part_columns(const T* __restrict x, int64_t n, T* __restrict even, T* __restrict odd) {
  for (int64_t j = 0; j < n; ++j) {
    even[j] = x[2 * j];
    odd[j] = x[2 * j + 1];
  }
}

template <class T>
PYGEN_CLONES void join_columns(const T* __restrict even, const T* __restrict odd, int64_t n, T* __restrict x) {
  for (int64_t j = 0; j < n; ++j) {
    x[2 * j] = even[j];
    x[2 * j + 1] = odd[j];
  }
}

// Rows of a width known to the compiler (0 for any other) have no loop left over.
template <int64_t kWidth, bool kHaar, class T>
PYGEN_CLONES void channel_rows(const T* __restrict even, const T* __restrict odd, int64_t rows, int64_t width,
                               T* __restrict first, T* __restrict second, T* __restrict third, T* __restrict fourth) {
  const int64_t w = kWidth ? kWidth : width;
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < w; ++j) {
      const int64_t top = 2 * i * w + j, bottom = top + w, at = i * w + j;
      const Four<T> channels = block_to_channels<kHaar>(even[top], odd[top], even[bottom], odd[bottom]);
      first[at] = channels.first;
      second[at] = channels.second;
      third[at] = channels.third;
      fourth[at] = channels.fourth;
    }
  }
}

template <int64_t kWidth, bool kHaar, class T>
PYGEN_CLONES void block_rows(const T* __restrict first, const T* __restrict second, const T* __restrict third,
                             const T* __restrict fourth, int64_t rows, int64_t width, T* __restrict even,
                             T* __restrict odd) {
  const int64_t w = kWidth ? kWidth : width;
  for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < w; ++j) {
      const int64_t top = 2 * i * w + j, bottom = top + w, at = i * w + j;
      const Four<T> block = channels_to_block<kHaar>(first[at], second[at], third[at], fourth[at]);
      even[top] = block.first;
      odd[top] = block.second;
      even[bottom] = block.third;
      odd[bottom] = block.fourth;
    }
  }
}

template <bool kHaar, class T>
auto channel_rows_of(int64_t width) {
  return width == 1   ? &channel_rows<1, kHaar, T>
         : width == 2 ? &channel_rows<2, kHaar, T>
         : width == 4 ? &channel_rows<4, kHaar, T>
         : width == 8 ? &channel_rows<8, kHaar, T>
                      : &channel_rows<0, kHaar, T>;
}

template <bool kHaar, class T>
auto block_rows_of(int64_t width) {
  return width == 1   ? &block_rows<1, kHaar, T>
         : width == 2 ? &block_rows<2, kHaar, T>
         : width == 4 ? &block_rows<4, kHaar, T>
         : width == 8 ? &block_rows<8, kHaar, T>
                      : &block_rows<0, kHaar, T>;
}

// Strips of whole rows of blocks, through all planes (n, c) of a picture: small enough for the first-level cache, and
// many planes at once where they are small.
struct Strips {
  int64_t channels, height, width;  // height and width in blocks
  int64_t rows, most;               // rows of blocks in all planes, and in a strip

  explicit Strips(const Tensor& picture)
      : channels(picture.size(1)),
        height(picture.size(2) / 2),
        width(picture.size(3) / 2),
        rows(picture.size(0) * channels * height),
        most(std::max<int64_t>(1, kBlock / 4 / std::max<int64_t>(1, width))) {}

  int64_t area() const { return height * width; }

  // Calls f(first row, rows, even, odd, spare) for all strips. In scratch, even and odd have room for their columns,
  // and spare for all numbers of a strip.
  template <class T, class F>
  void each(const F& f) const {
    if (width == 0) return;
    const int64_t blocks = most * width;
    parallel((rows + most - 1) / most, 2 * blocks, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(8 * blocks)]);
      for (int64_t row = begin * most; row < std::min(rows, end * most); row += most) {
        f(row, std::min(most, rows - row), scratch.get(), scratch.get() + 2 * blocks, scratch.get() + 4 * blocks);
      }
    });
  }

  // Calls f(plane of the first of its channels, row within it, rows, blocks before) for each plane that a strip cuts.
  template <class F>
  void each_plane(int64_t row, int64_t count, const F& f) const {
    for (int64_t done = 0; done < count;) {
      const int64_t plane = (row + done) / height, within = (row + done) % height;
      const int64_t take = std::min(count - done, height - within);
      f(plane / channels * kCorners * channels + plane % channels, within, take, done * width);
      done += take;
    }
  }
};

template <bool kHaar, class T>
void to_channels(const Tensor& x, Tensor& y) {
  const Strips strips(x);
  const Rows picture(x, 4);
  void* const out = y.mutable_data_ptr();
  const ScalarType dtype = y.scalar_type();
  const int64_t width = strips.width, apart = strips.channels * strips.area();
  const auto make_channels = channel_rows_of<kHaar, T>(width);
  strips.each<T>([&](int64_t first, int64_t count, T* even, T* odd, T* spare) {
    const int64_t n = count * width;
    part_columns(read_block(picture, 0, 4 * first * width, 4 * n, spare), 2 * n, even, odd);
    strips.each_plane(first, count, [&](int64_t plane, int64_t row, int64_t rows, int64_t before) {
      const int64_t at = plane * strips.area() + row * width, blocks = rows * width;
      T* channels[kCorners];
      for (int64_t k = 0; k < kCorners; ++k) channels[k] = block_target(out, dtype, at + k * apart, spare + k * blocks);
      make_channels(even + 2 * before, odd + 2 * before, rows, width, channels[0], channels[1], channels[2],
                    channels[3]);
      for (int64_t k = 0; k < kCorners; ++k) write_block(out, dtype, at + k * apart, blocks, channels[k]);
    });
  });
}

// The numbers of rows that lie dense one after another, in the type of the arithmetic; else null.
template <class T>
const T* dense_values(const Rows& rows) {
  constexpr ScalarType own = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const bool together = rows.row_dims == 0 || (rows.row_dims == 1 && rows.row_strides[0] == rows.width);
  return rows.dtype == own && rows.dense() && together ? static_cast<const T*>(rows.data) : nullptr;
}

template <bool kHaar, class T>
void to_picture(const Tensor& y, Tensor& x) {
  const Strips strips(x);
  const Rows planes(y, 2);
  void* const out = x.mutable_data_ptr();
  const ScalarType dtype = x.scalar_type();
  const int64_t width = strips.width, apart = strips.channels * strips.area();
  // Small planes are many: where they can be read in place, they are not asked for one by one.
  const T* const values = dense_values<T>(planes);
  const auto make_blocks = block_rows_of<kHaar, T>(width);
  strips.each<T>([&](int64_t first, int64_t count, T* even, T* odd, T* spare) {
    strips.each_plane(first, count, [&](int64_t plane, int64_t row, int64_t rows, int64_t before) {
      const int64_t blocks = rows * width;
      const T* channels[kCorners];
      for (int64_t k = 0; k < kCorners; ++k) {
        channels[k] = values ? values + plane * strips.area() + row * width + k * apart
                             : read_block(planes, plane + k * strips.channels, row * width, blocks, spare + k * blocks);
      }
      make_blocks(channels[0], channels[1], channels[2], channels[3], rows, width, even + 2 * before, odd + 2 * before);
    });
    const int64_t at = 4 * first * width, n = count * width;
    T* const target = block_target(out, dtype, at, spare);
    join_columns(even, odd, 2 * n, target);
    write_block(out, dtype, at, 4 * n, target);
  });
}

// float also for the 16-bit dtypes: a sum of four is rounded once.
template <class F>
void for_arithmetic(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

Tensor wavelet_forward(const Tensor& x, bool haar) {
  Tensor y = empty_channels(x);
  for_arithmetic(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    haar ? to_channels<true, T>(x, y) : to_channels<false, T>(x, y);
  });
  return y;
}

Tensor wavelet_inverse(const Tensor& y, bool haar) {
  Tensor x = empty_picture(y);
  for_arithmetic(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    haar ? to_picture<true, T>(y, x) : to_picture<false, T>(y, x);
  });
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, library) {
  library.impl("wavelet_forward", TORCH_BOX(&wavelet_forward));
  library.impl("wavelet_inverse", TORCH_BOX(&wavelet_inverse));
}

}  // namespace
}  // namespace pygen
