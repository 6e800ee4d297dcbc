// Correct kernels that use each feature of simt.h once; prints a line for each wrong number.
#include <cmath>
#include <cstdio>
#include <vector>

#include "buffer.h"

using pygen::launch;

static int wrong = 0;
static pygen::Stream stream;

static void expect(const char* what, size_t i, double got, double expected) {
  if (got == expected) return;
  if (++wrong < 20) printf("%s[%zu] is %.9g, expected %.9g\n", what, i, got, expected);
}

template <class T>
__global__ void __launch_bounds__(256)
    row_statistics_kernel(const T* __restrict__ x, int64_t n, T* __restrict__ sums, T* __restrict__ maxima) {
  SHARED(T, scratch, [32]);
  const T* row = x + blockIdx.x * n;
  T sum = 0, largest = row[0];
  for (int64_t i = pygen::thread_rank(); i < n; i += pygen::block_size()) {
    const T value = __ldg(row + i);
    sum += value;
    largest = max(largest, value);
  }
  sum = pygen::block_sum(sum, scratch);
  largest = pygen::block_max(largest, scratch);
  // The last thread writes: the result must be in all of them.
  if (pygen::thread_rank() == pygen::block_size() - 1) {
    sums[blockIdx.x] = sum;
    maxima[blockIdx.x] = largest;
  }
}

template <class T>
static void row_statistics(dim3 block) {
  const int rows = 5, n = 1003;
  Buffer<T> x(rows * n), sums(rows), maxima(rows);
  for (int i = 0; i < rows * n; ++i) x[i] = T(i * 7919 % 113) - T(100);
  launch(row_statistics_kernel<T>, dim3(rows), block, 0, stream, x.data, n, sums.data, maxima.data);
  wait_for_device();
  for (int row = 0; row < rows; ++row) {
    T sum = 0, largest = x[row * n];
    for (int i = 0; i < n; ++i) {
      sum += x[row * n + i];
      largest = x[row * n + i] > largest ? x[row * n + i] : largest;
    }
    expect("row_statistics sum", row, double(sums[row]), double(sum));
    expect("row_statistics max", row, double(maxima[row]), double(largest));
  }
}

__global__ void max_of_nan_kernel(float* out) {
  SHARED(float, scratch, [32]);
  const float value = threadIdx.x == 37 ? NAN : float(threadIdx.x);
  out[threadIdx.x] = pygen::block_max(value, scratch);
}

static void max_of_nan() {
  Buffer<float> out(64);
  launch(max_of_nan_kernel, dim3(1), dim3(64), 0, stream, out.data);
  wait_for_device();
  for (int i = 0; i < 64; ++i) expect("max_of_nan", i, std::isnan(out[i]), 1);
}

__global__ void transpose_kernel(const float* x, float* out, int rows, int columns) {
  SHARED(float, tile, [16][17]);
  const int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = x[row * columns + column];
  __syncthreads();
  const int out_row = blockIdx.x * 16 + threadIdx.y, out_column = blockIdx.y * 16 + threadIdx.x;
  if (out_row < columns && out_column < rows) {
    out[out_row * rows + out_column] = tile[threadIdx.x][threadIdx.y];
  }
}

static void transpose() {
  const int rows = 37, columns = 50;
  Buffer<float> x(rows * columns), out(rows * columns, -1);
  for (int i = 0; i < rows * columns; ++i) x[i] = float(i);
  launch(transpose_kernel, dim3(4, 3), dim3(16, 16), 0, stream, x.data, out.data, rows, columns);
  wait_for_device();
  for (int i = 0; i < rows * columns; ++i) {
    expect("transpose", i, out[i], x[i % rows * columns + i / rows]);
  }
}

// Threads past the end leave first, and the barrier does not wait for them.
template <class T>
__global__ void reverse_kernel(const T* x, T* out, int n) {
  T* copy = pygen::dynamic_shared<T>();
  const int i = threadIdx.x;
  if (i >= n) return;
  copy[i] = x[i];
  __syncthreads();
  out[i] = copy[n - 1 - i];
}

template <class T>
static void reverse(size_t shared_bytes) {
  const int n = 203;
  Buffer<T> x(n), out(n);
  for (int i = 0; i < n; ++i) x[i] = T(i + 1);
  launch(reverse_kernel<T>, dim3(1), dim3(256), shared_bytes, stream, x.data, out.data, n);
  wait_for_device();
  for (int i = 0; i < n; ++i) expect("reverse", i, double(out[i]), double(n - i));
}

__global__ void three_dimensions_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int rank = pygen::thread_rank();
  out[block * pygen::block_size() + rank] =
      int(threadIdx.x) + 10 * int(threadIdx.y) + 100 * int(threadIdx.z) + 1000 * block;
}

static void three_dimensions() {
  Buffer<int> out(24 * 24);
  launch(three_dimensions_kernel, dim3(2, 3, 4), dim3(4, 3, 2), 0, stream, out.data);
  wait_for_device();
  for (int i = 0; i < 24 * 24; ++i) {
    const int rank = i % 24;
    expect("three_dimensions", i, out[i], rank % 4 + 10 * (rank / 4 % 3) + 100 * (rank / 12) + 1000 * (i / 24));
  }
}

__global__ void votes_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  unsigned* row = out + 8 * threadIdx.x;
  row[0] = __ballot_sync(~0u, lane % 3 == 0);
  row[1] = __any_sync(~0u, lane == 31);
  row[2] = __any_sync(~0u, lane == 32);
  row[3] = __all_sync(~0u, lane < 32);
  row[4] = __all_sync(~0u, lane != 5);
  row[5] = __syncthreads_count(threadIdx.x % 5 == 0);
  row[6] = __syncthreads_or(threadIdx.x == 63);
  row[7] = __syncthreads_and(threadIdx.x != 63);
}

static void votes() {
  Buffer<unsigned> out(64 * 8);
  launch(votes_kernel, dim3(1), dim3(64), 0, stream, out.data);
  wait_for_device();
  const unsigned expected[8] = {0x49249249u, 1, 0, 1, 0, 13, 1, 0};
  for (int i = 0; i < 64 * 8; ++i) expect("votes", i, out[i], expected[i % 8]);
}

// The halves of each warp part, and each shuffles among its own; then all meet.
__global__ void divergent_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int value = lane;
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0x0000ffffu, value, offset);
    }
  } else if (lane % 2 == 0) {
    value = __shfl_sync(0x55550000u, value, 30);
  } else {
    value = __popc(__ballot_sync(0xaaaa0000u, lane > 20));
  }
  __syncwarp();
  out[2 * threadIdx.x] = value;
  out[2 * threadIdx.x + 1] = __shfl_sync(~0u, value, 31 - lane);
}

static void divergent() {
  Buffer<int> out(2 * 96);
  launch(divergent_kernel, dim3(1), dim3(96), 0, stream, out.data);
  wait_for_device();
  for (int i = 0; i < 96; ++i) {
    const int lane = i % 32, other = 31 - lane;
    expect("divergent", i, out[2 * i], lane < 16 ? 120 : lane % 2 == 0 ? 30 : 6);
    expect("divergent mirrored", i, out[2 * i + 1], other < 16 ? 120 : other % 2 == 0 ? 30 : 6);
  }
}

template <class T>
__global__ void shuffles_kernel(T* out) {
  const int lane = threadIdx.x % 32;
  const T value = T(lane + 1);
  T* row = out + 6 * threadIdx.x;
  row[0] = __shfl_up_sync(~0u, value, 3);
  row[1] = __shfl_down_sync(~0u, value, 3);
  row[2] = __shfl_up_sync(~0u, value, 3, 8);
  row[3] = __shfl_down_sync(~0u, value, 3, 8);
  row[4] = __shfl_sync(~0u, value, 10, 8);
  row[5] = __shfl_xor_sync(~0u, value, 9, 8);
}

template <class T>
static void shuffles() {
  Buffer<T> out(6 * 32);
  launch(shuffles_kernel<T>, dim3(1), dim3(32), 0, stream, out.data);
  wait_for_device();
  for (int lane = 0; lane < 32; ++lane) {
    const int begin = lane / 8 * 8, end = begin + 8;
    const int source[6] = {lane < 3 ? lane : lane - 3,
                           lane + 3 > 31 ? lane : lane + 3,
                           lane - 3 < begin ? lane : lane - 3,
                           lane + 3 >= end ? lane : lane + 3,
                           begin + 2,
                           (lane ^ 9) >= end ? lane : lane ^ 9};
    for (int i = 0; i < 6; ++i) {
      expect("shuffles", 6 * lane + i, double(out[6 * lane + i]), source[i] + 1);
    }
  }
}

// Lanes that have left are in the mask, which CUDA allows as long as none reads from them.
__global__ void short_warp_kernel(int* out, int n) {
  if (int(threadIdx.x) >= n) return;
  out[threadIdx.x] = int(__ballot_sync(~0u, 1)) + __shfl_sync(~0u, int(threadIdx.x), 2);
}

static void short_warp() {
  Buffer<int> out(32, -1);
  launch(short_warp_kernel, dim3(1), dim3(32), 0, stream, out.data, 7);
  launch(short_warp_kernel, dim3(1), dim3(7), 0, stream, out.data + 16, 7);
  wait_for_device();
  for (int i = 0; i < 32; ++i) expect("short_warp", i, out[i], i % 16 < 7 ? 127 + 2 : -1);
}

__global__ void atomics_kernel(int* counts, unsigned* bits, unsigned long long* largest, int* slots, int* last,
                               int* total) {
  SHARED(int, ticket, );
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&counts[i % 7], 1);
  atomicOr(bits, 1u << (i % 29));
  atomicMax(largest, static_cast<unsigned long long>(i) << 32);
  for (int slot = i % 64; atomicCAS(&slots[slot], -1, i) != -1; slot = (slot + 1) % 1024) {
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ticket = atomicAdd(last, 1);
  __syncthreads();
  // The last block to arrive sums what all the others have counted.
  if (ticket == int(gridDim.x) - 1 && threadIdx.x == 0) {
    __threadfence();
    *total = 0;
    for (int bin = 0; bin < 7; ++bin) *total += atomicAdd(&counts[bin], 0);
  }
}

static void atomics() {
  Buffer<int> counts(7), slots(1024, -1), last(1), total(1);
  Buffer<unsigned> bits(1);
  Buffer<unsigned long long> largest(1);
  launch(atomics_kernel, dim3(6), dim3(96), 0, stream, counts.data, bits.data, largest.data, slots.data, last.data,
         total.data);
  wait_for_device();
  for (int bin = 0; bin < 7; ++bin) expect("atomics counts", bin, counts[bin], bin < 2 ? 83 : 82);
  expect("atomics bits", 0, bits[0], (1u << 29) - 1);
  expect("atomics largest", 0, double(largest[0] >> 32), 575);
  std::vector<int> seen(576);
  for (int i = 0; i < 1024; ++i) {
    if (slots[i] >= 0) ++seen[slots[i]];
  }
  for (int i = 0; i < 576; ++i) expect("atomics slots", i, seen[i], 1);
  expect("atomics total", 0, total[0], 576);
}

__global__ void intrinsics_kernel(const float4* x, float* out) {
  const float4 v = x[threadIdx.x];
  const int4 k = make_int4(1, 2, 3, 4);
  out[0] = v.x + 10 * v.y + 100 * v.z + 1000 * v.w;
  out[1] = float(k.x + k.y + k.z + k.w);
  out[2] = float(__popc(0xf0f0u));
  out[3] = float(__clz(1));
  out[4] = float(__ffs(8));
  out[5] = float(__umulhi(0x80000000u, 6u));
  out[6] = __int_as_float(__float_as_int(2.5f));
  out[7] = __uint_as_float(__float_as_uint(-2.5f));
  out[8] = __fmaf_rn(2.0f, 3.0f, 4.0f);
  out[9] = min(2.0f, 3.0f) + max(2.0f, 3.0f) * 10;
  out[10] = float(min(-2, 3) + max(-2, 3) * 10);
  out[11] = max(NAN, 3.0f);
}

static void intrinsics() {
  Buffer<float4> x(1, make_float4(1, 2, 3, 4));
  Buffer<float> out(12);
  launch(intrinsics_kernel, dim3(1), dim3(1), 0, stream, x.data, out.data);
  wait_for_device();
  const float expected[12] = {4321, 10, 8, 31, 4, 3, 2.5f, -2.5f, 10, 32, 28, 3};
  for (int i = 0; i < 12; ++i) expect("intrinsics", i, out[i], expected[i]);
}

int main() {
#ifdef __CUDACC__
  STD_CUDA_CHECK(cudaStreamCreate(&stream));
#endif
  for (dim3 block : {dim3(32), dim3(256), dim3(16, 6), dim3(4, 4, 8)}) {
    row_statistics<float>(block);
    row_statistics<double>(block);
    row_statistics<int>(block);
  }
  max_of_nan();
  transpose();
  reverse<float>(203 * sizeof(float));
  reverse<double>(203 * sizeof(double));
  reverse<short>(99 * 1024);
  three_dimensions();
  votes();
  divergent();
  shuffles<int>();
  shuffles<unsigned>();
  shuffles<long long>();
  shuffles<unsigned long long>();
  shuffles<float>();
  shuffles<double>();
  short_warp();
  atomics();
  intrinsics();
  launch(three_dimensions_kernel, dim3(0, 3, 4), dim3(4, 3, 2), 0, stream, nullptr);
  printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
