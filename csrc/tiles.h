// Elements with many parameters each on CUDA, one thread an element: a block takes a tile of neighbouring elements,
// whose parameters move through shared memory 16 bytes at a time, and their gradients back. Each element's share of a
// log-determinant is added into fixed places (no atomics: results repeat bit for bit).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simt.h"
#include "tensor.h"
#include "vector.h"

namespace pygen::tiles {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 128;
constexpr size_t kSharedTarget = 48 * 1024;             // a tile above this leaves too few blocks on a multiprocessor
constexpr size_t kSharedMost = kMostShared - 2 * 1024;  // beside static arrays
constexpr int64_t kChunk = 512;                         // elements of a long row that one block takes
constexpr int kSerial = 16;  // rows up to this width are added by one thread, longer ones by a warp
constexpr int kVector = 4;
constexpr int kMaxParts = 4;

// One of the tensors that hold parameters, (..., columns).
struct Part {
  Rows elements;   // the first parameter of each element, in one row
  int64_t stride;  // between an element's parameters
  int columns;
  bool dense;   // all parameters of all elements lie side by side
  int phase;    // elements past a whole vector at which they begin
  int readers;  // where not dense, threads that read an element: neighbours read what lies side by side

  Part() = default;
  explicit Part(const Tensor& x)
      : elements(x, x.dim() - 1, 1),
        stride(x.stride(x.dim() - 1)),
        columns(static_cast<int>(x.size(x.dim() - 1))),
        dense(Rows(x, x.dim()).dense()),
        phase(for_dtype(x.scalar_type(),
                        [&](auto element) {
                          return static_cast<int>(reinterpret_cast<uintptr_t>(x.data_ptr()) / sizeof(element) %
                                                  kVector);
                        })),
        readers(1) {
    const bool planar = stride != 1 && elements.event_dims > 0 && elements.event_strides[elements.event_dims - 1] == 1;
    while (!planar && readers < columns && readers < kWarp) readers *= 2;
  }
};

struct Parts {
  Part parts[kMaxParts];
  int count;
  int columns;  // of all parts
  int padded;   // numbers an element takes in shared memory: odd, so that neighbours lie in different banks

  explicit Parts(const std::vector<Tensor>& tensors) : count(static_cast<int>(tensors.size())), columns(0) {
    for (int i = 0; i < count; ++i) {
      parts[i] = Part(tensors[static_cast<size_t>(i)]);
      columns += parts[i].columns;
    }
    padded = columns | 1;
  }
};

template <class T>
__device__ __forceinline__ T read_one(const Rows& rows, int64_t i) {
  T value;
  load_vector<1>(rows.data, rows.dtype, rows.event_offset(i), 1, true, &value);
  return value;
}

// A dense tensor that a kernel writes.
struct Output {
  void* data;
  ScalarType dtype;

  explicit Output(Tensor& tensor) : data(tensor.mutable_data_ptr()), dtype(tensor.scalar_type()) {}
};

template <class T>
__device__ __forceinline__ void write_one(const Output& output, int64_t i, T value) {
  store_vector<1>(output.data, output.dtype, i, 1, true, &value);
}

// Calls move(at, count, whole, positions) for the vectors of `columns` numbers each of n elements, of which the first
// is `first` numbers into a tensor that begins `phase` numbers past a whole vector: `at` counts from that tensor's
// beginning, and positions[k] is where number at + k is in shared memory.
template <class Move>
__device__ __forceinline__ void for_vectors(int64_t first, int n, int columns, int phase, int padded, int offset,
                                            const Move& move) {
  const int total = n * columns, lead = static_cast<int>((first + phase) % kVector);
  for (int from = static_cast<int>(threadIdx.x) * kVector - lead; from < total;
       from += static_cast<int>(blockDim.x) * kVector) {
    const int begin = max(from, 0), end = min(from + kVector, total);
    int element = begin / columns, column = begin % columns, positions[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      positions[k] = element * padded + offset + column;
      if (++column == columns) {
        column = 0;
        ++element;
      }
    }
    move(first + begin, end - begin, end - begin == kVector, positions);
  }
}

// The parameters of elements first .. first + n into shared memory, an element's own one after another.
template <class T>
__device__ __forceinline__ void stage(const Parts& parameters, int64_t first, int n, T* shared) {
  int offset = 0;
  for (int i = 0; i < parameters.count; ++i) {
    const Part& part = parameters.parts[i];
    const void* data = part.elements.data;
    const ScalarType dtype = part.elements.dtype;
    if (part.dense) {
      for_vectors(first * part.columns, n, part.columns, part.phase, parameters.padded, offset,
                  [&](int64_t at, int count, bool whole, const int* positions) {
                    T values[kVector];
                    load_vector<kVector>(data, dtype, at, count, whole, values);
#pragma unroll
                    for (int k = 0; k < kVector; ++k) {
                      if (k < count) shared[positions[k]] = values[k];
                    }
                  });
    } else {
      const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
      const int readers = min(part.readers, threads);
      for (int e = thread / readers; e < n; e += threads / readers) {
        const int64_t from = part.elements.event_offset(first + e);
        T* const to = shared + e * parameters.padded + offset;
        for (int j = thread % readers; j < part.columns; j += readers) {
          load_vector<1>(data, dtype, from + j * part.stride, 1, true, to + j);
        }
      }
    }
    offset += part.columns;
  }
}

// Shared memory to elements first .. first + n of a dense tensor (..., columns).
template <class T>
__device__ __forceinline__ void unstage(const T* shared, const Parts& parameters, int64_t first, int n,
                                        const Output& output) {
  for_vectors(first * parameters.columns, n, parameters.columns, 0, parameters.padded, 0,
              [&](int64_t at, int count, bool whole, const int* positions) {
                T values[kVector];
#pragma unroll
                for (int k = 0; k < kVector; ++k) values[k] = k < count ? shared[positions[k]] : T(0);
                store_vector<kVector>(output.data, output.dtype, at, count, whole, values);
              });
}

// How elements are dealt to blocks: tiles of whole rows where rows are short, chunks of a row where they are long.
struct Plan {
  int threads, tile;
  int64_t rows, width, chunks, chunk;  // chunks of a row, and elements of one; chunks is 0 for tiles of whole rows

  Plan(int64_t elements, int64_t row_width, int block)
      : threads(block), tile(block), rows(elements / row_width), width(row_width) {
    if (width <= block) {
      tile = static_cast<int>(block / width * width);
      chunks = 0;
      chunk = tile;
    } else {
      chunks = (width + kChunk - 1) / kChunk;
      chunk = (width + chunks - 1) / chunks;
      const int64_t tiles = (chunk + block - 1) / block;
      tile = static_cast<int>((chunk + tiles - 1) / tiles);
    }
  }

  int64_t blocks() const { return chunks ? rows * chunks : (rows * width + tile - 1) / tile; }
};

// The elements of a block; with chunks, tile after tile.
struct Range {
  int64_t first, last;

  __device__ __forceinline__ Range(const Plan& plan, int64_t block) {
    if (plan.chunks) {
      const int64_t row = block / plan.chunks;
      first = row * plan.width + block % plan.chunks * plan.chunk;
      last = min(first + plan.chunk, (row + 1) * plan.width);
    } else {
      first = block * plan.chunk;
      last = min(first + plan.chunk, plan.rows * plan.width);
    }
  }
};

// ladj of the rows in a tile, given each thread's element in it; or of one row, or into `partial` of one chunk, given
// the sum over each thread's elements. All threads of the block call.
template <class T>
__device__ __forceinline__ void add_rows(const Plan& plan, Range range, T own, double sum, T* ladj, double* partial) {
  SHARED(double, scratch, [32]);
  SHARED(T, all, [kMaxThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  if (plan.chunks) {
    sum = block_sum(sum, scratch);
    if (thread == 0 && plan.chunks == 1) ladj[blockIdx.x] = static_cast<T>(sum);
    if (thread == 0 && plan.chunks > 1) partial[blockIdx.x] = sum;
    return;
  }
  all[thread] = own;
  __syncthreads();
  const int width = static_cast<int>(plan.width), rows = static_cast<int>((range.last - range.first) / plan.width);
  const int64_t first_row = range.first / plan.width;
  if (width <= kSerial) {
    for (int row = thread; row < rows; row += plan.threads) {
      double row_sum = 0;
      for (int i = 0; i < width; ++i) row_sum += static_cast<double>(all[row * width + i]);
      ladj[first_row + row] = static_cast<T>(row_sum);
    }
    return;
  }
  for (int row = thread / kWarp; row < rows; row += plan.threads / kWarp) {
    double row_sum = 0;
    for (int i = thread % kWarp; i < width; i += kWarp) row_sum += static_cast<double>(all[row * width + i]);
    row_sum = warp_sum(row_sum);
    if (thread % kWarp == 0) ladj[first_row + row] = static_cast<T>(row_sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) add_chunks_kernel(const double* partial, int64_t chunks, T* ladj) {
  SHARED(double, scratch, [32]);
  const int64_t row = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) sum += partial[row * chunks + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) ladj[row] = static_cast<T>(sum);
}

inline unsigned grid_of(int64_t blocks) {
  check(blocks <= 0x7fffffff, "x has too many elements for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// Calls own = f(i, its parameters in shared memory) for each element i of a block, and adds what it returns, the
// element's share of a log-determinant, into its row. All threads of the block call.
template <class T, class F>
__device__ __forceinline__ void map_elements(const Parts& parameters, const Plan& plan, T* ladj, double* partial,
                                             const F& f) {
  T* const shared = dynamic_shared<T>();
  const int thread = static_cast<int>(threadIdx.x);
  const Range range(plan, blockIdx.x);
  double sum = 0;
  T own = T(0);
  for (int64_t from = range.first; from < range.last; from += plan.tile) {
    const int n = static_cast<int>(min(static_cast<int64_t>(plan.tile), range.last - from));
    __syncthreads();  // the tile before may still be in use
    stage(parameters, from, n, shared);
    __syncthreads();
    if (thread < n) {
      own = f(from + thread, shared + thread * parameters.padded);
      sum += static_cast<double>(own);
    }
  }
  add_rows(plan, range, own, sum, ladj, partial);
}

// Calls f(i, its parameters in shared memory) for a block's elements, a thread each, and writes what it leaves there.
// All threads of the block call.
template <class T, class F>
__device__ __forceinline__ void replace_parameters(const Parts& parameters, int64_t elements, const Output& output,
                                                   const F& f) {
  T* const shared = dynamic_shared<T>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t threads = blockDim.x, first = blockIdx.x * threads;
  const int n = static_cast<int>(min(threads, elements - first));
  stage(parameters, first, n, shared);
  __syncthreads();
  if (thread < n) f(first + thread, shared + thread * parameters.padded);
  __syncthreads();
  unstage(shared, parameters, first, n, output);
}

// Threads of a block, each with `numbers` of its own in shared memory: less than a warp where a warp's do not fit.
template <class T>
constexpr int threads_for(int numbers) {
  const auto bytes = [numbers](int threads) { return sizeof(T) * static_cast<size_t>(numbers * threads); };
  int threads = kMaxThreads;
  while (threads > kWarp && bytes(threads) > kSharedTarget) threads /= 2;
  while (bytes(threads) > kSharedMost) threads /= 2;
  return threads;
}

// Launches a kernel that calls replace_parameters, and gives each thread `numbers` of shared memory.
template <class T, class Arguments>
void launch_elements(void (*kernel)(Arguments), const Arguments& arguments, int64_t elements, int numbers,
                     Stream stream) {
  const int threads = threads_for<T>(numbers);
  launch(kernel, grid_of((elements + threads - 1) / threads), threads,
         sizeof(T) * static_cast<size_t>(threads * numbers), stream, arguments);
}

// Calls run(plan, blocks, shared bytes, partial) to launch a kernel that calls map_elements, and adds up what it
// leaves.
template <class T, class Run>
void launch_rows(const Tensor& x, int64_t width, const Parts& parameters, Stream stream, T* ladj, const Run& run) {
  static_assert(threads_for<double>(3 * 128 + 1) == kWarp, "add_rows works by warps, with the most parameters too");
  const Plan plan(x.numel(), width, threads_for<T>(parameters.padded));
  const size_t shared = sizeof(T) * static_cast<size_t>(plan.threads * parameters.padded);
  const Tensor partial = torch::stable::new_empty(x, {plan.chunks > 1 ? plan.blocks() : 0}, ScalarType::Double);
  double* const sums = static_cast<double*>(partial.mutable_data_ptr());
  run(plan, grid_of(plan.blocks()), shared, sums);
  if (plan.chunks > 1)
    launch(add_chunks_kernel<T>, grid_of(plan.rows), kMaxThreads, 0, stream, sums, plan.chunks, ladj);
}

}  // namespace pygen::tiles
