// Kernels with one planted fault each, chosen by the first argument; a line that must be named in
// the report ends in "fault:" and the fault's name.
#include <cstdio>
#include <cstring>
#include <exception>

#include "buffer.h"

using pygen::dynamic_shared;
using pygen::launch;

constexpr int kThreads = 64;

__global__ void past_global_kernel(float* out) {
  out[threadIdx.x + 1] = 1;  // fault: past_global
}

__global__ void past_static_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  tile[threadIdx.x + 1] = 1;  // fault: past_static
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void past_dynamic_kernel(float* out) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];  // fault: past_dynamic
}

// The switches to and from the fiber must leave the guards of its own frame in place.
__global__ void past_local_kernel(float* out) {
  volatile float local[4] = {};
  for (int i = 0; i < 4; ++i) local[i] = out[threadIdx.x];
  __syncthreads();
  const int end = 4 + int(blockIdx.x);
  out[threadIdx.x] = local[end];  // fault: past_local
}

template <bool synchronised>
__global__ void reverse_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = float(threadIdx.x + 1);  // fault: no_barrier
  if (synchronised) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];  // fault: no_barrier
}

// The neighbour's value is read in the same order in which it is written, so that the numbers are
// right in the ascending order and wrong in the descending one.
template <bool synchronised>
__global__ void previous_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = float(threadIdx.x + 1);  // fault: no_barrier_one_order
  if (synchronised) __syncthreads();
  out[threadIdx.x] = threadIdx.x == 0 ? 0 : tile[threadIdx.x - 1];  // fault: no_barrier_one_order
}

// The second barrier of the loop is missing: a fast warp overwrites what a slow one still reads.
__global__ void no_second_barrier_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    tile[threadIdx.x] = float(step);  // fault: no_second_barrier
    __syncthreads();
    sum += tile[kThreads - 1 - threadIdx.x];  // fault: no_second_barrier
  }
  out[threadIdx.x] = sum;
}

// A shuffle makes lanes wait for each other, yet orders no memory: only __syncwarp does.
template <bool synchronised>
__global__ void shuffle_for_barrier_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = 1;  // fault: shuffle_for_barrier
  float sum = pygen::warp_sum(1.0f);
  if (synchronised) __syncwarp();
  out[threadIdx.x] = sum + tile[threadIdx.x ^ 1];  // fault: shuffle_for_barrier
}

__global__ void blocks_collide_kernel(float* out) {
  __syncthreads();
  out[threadIdx.x] = float(blockIdx.x);  // fault: blocks_collide
  __syncthreads();
}

__global__ void exited_lane_kernel(float* out) {
  if (threadIdx.x >= 40) return;
  out[threadIdx.x] = __shfl_down_sync(~0u, 1.0f, 4);  // fault: exited_lane
}

__global__ void unnamed_lane_kernel(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 16);  // fault: unnamed_lane
}

__global__ void own_lane_unnamed_kernel(float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0);  // fault: own_lane_unnamed
}

__global__ void different_masks_kernel(float*) {
  __syncwarp(threadIdx.x % 2 == 0 ? ~0u : 0xaaaaaaaau | 1u);  // fault: different_masks
}

__global__ void warp_against_block_kernel(float* out) {
  if (threadIdx.x < 48) {
    __syncthreads();  // fault: warp_against_block
  } else {
    out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 31);  // fault: warp_against_block
  }
}

__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();  // fault: two_barriers
  } else {
    out[0] = float(threadIdx.x == 32);
    __syncthreads();  // fault: two_barriers
  }
}

__global__ void bad_width_kernel(float* out) {
  out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0, 12);  // fault: bad_width
}

__global__ void large_static_kernel(float* out) {
  SHARED(float, tile, [12 * 1024 + 1]);
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void throws_kernel(float*) {
  if (threadIdx.x == 3) throw std::runtime_error("no kernel should throw");
}

__global__ void unwritten_kernel(float* out) {
  SHARED(float, tile, [kThreads]);
  if (threadIdx.x != 5) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

static void run(const char* name) {
  struct Fault {
    const char* name;
    void (*kernel)(float*);
    dim3 grid = dim3(1), block = dim3(kThreads);
    size_t shared_bytes = 0;
  };
  const size_t tile_bytes = kThreads * sizeof(float);
  const Fault faults[] = {
      {"past_global", past_global_kernel},
      {"past_static", past_static_kernel},
      {"past_dynamic", past_dynamic_kernel, 1, kThreads, tile_bytes},
      {"past_local", past_local_kernel},
      {"no_barrier", reverse_kernel<false>},
      {"barrier", reverse_kernel<true>},
      {"no_barrier_one_order", previous_kernel<false>},
      {"barrier_one_order", previous_kernel<true>},
      {"no_second_barrier", no_second_barrier_kernel},
      {"shuffle_for_barrier", shuffle_for_barrier_kernel<false>},
      {"syncwarp", shuffle_for_barrier_kernel<true>},
      {"blocks_collide", blocks_collide_kernel, 2},
      {"exited_lane", exited_lane_kernel},
      {"unnamed_lane", unnamed_lane_kernel},
      {"own_lane_unnamed", own_lane_unnamed_kernel},
      {"different_masks", different_masks_kernel},
      {"warp_against_block", warp_against_block_kernel},
      {"two_barriers", two_barriers_kernel},
      {"bad_width", bad_width_kernel},
      {"large_static", large_static_kernel},
      {"throws", throws_kernel},
      {"unwritten", unwritten_kernel},
      {"no_threads", unwritten_kernel, 1, dim3(0)},
      {"many_threads", unwritten_kernel, 1, dim3(32, 33)},
      {"tall_grid", unwritten_kernel, dim3(1, 65536)},
      {"deep_grid", unwritten_kernel, dim3(1, 1, 65536)},
      {"much_shared", unwritten_kernel, 1, kThreads, 99 * 1024 + 1},
      {"empty_grid", past_global_kernel, dim3(0, 65536), dim3(4096)},
  };
  for (const Fault& fault : faults) {
    if (strcmp(fault.name, name) != 0) continue;
    Buffer<float> out(kThreads);
    try {
      launch(fault.kernel, fault.grid, fault.block, fault.shared_bytes, pygen::Stream(), out.data);
    } catch (const std::exception& error) {
      printf("error: %s\n", error.what());
    }
    for (int i = 0; i < kThreads; ++i) printf("%g ", out[i]);
    printf("\n");
    return;
  }
  printf("unknown fault %s\n", name);
}

// Several names run in one process: a fault must leave the next launch as it should be.
int main(int count, char** names) {
  for (int i = 1; i < count; ++i) run(names[i]);
}
