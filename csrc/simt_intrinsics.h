// CUDA's device vocabulary for the host compiler: qualifiers, vector types, barriers, shuffles,
// votes, integer atomics and bit operations, as far as the kernels may use them.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// CUDA's alignment, so that a misaligned vector load is undefined behaviour here as it is there.
#define PYGEN_VECTOR_TYPES(T, name)                                                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

PYGEN_VECTOR_TYPES(signed char, char)
PYGEN_VECTOR_TYPES(unsigned char, uchar)
PYGEN_VECTOR_TYPES(short, short)
PYGEN_VECTOR_TYPES(unsigned short, ushort)
PYGEN_VECTOR_TYPES(int, int)
PYGEN_VECTOR_TYPES(unsigned, uint)
PYGEN_VECTOR_TYPES(long long, longlong)
PYGEN_VECTOR_TYPES(unsigned long long, ulonglong)
PYGEN_VECTOR_TYPES(float, float)
PYGEN_VECTOR_TYPES(double, double)
#undef PYGEN_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

// The fiber scheduler sets them each time it resumes a thread.
constinit inline thread_local uint3 threadIdx{}, blockIdx{};
constinit inline thread_local dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

namespace pygen::simt {

using Place = std::source_location;
__extension__ typedef unsigned __int128 uint128;

enum class Operation : uint8_t {
  kSyncwarp,
  kShuffle,
  kVote,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
};

// Both stop the calling thread until all who must meet it have come.
unsigned wait_for_block(Operation operation, bool predicate, Place place);
uint64_t wait_for_warp(Operation operation, unsigned mask, int source_lane, uint64_t sent, Place place);
void record_bad_width(int width, Place place);
int lane_index();

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Place place) {
  uint64_t sent = 0, received;
  __builtin_memcpy(&sent, &value, sizeof(T));
  received = wait_for_warp(Operation::kShuffle, mask, source_lane, sent, place);
  __builtin_memcpy(&value, &received, sizeof(T));
  return value;
}

inline int segment_begin(int width, Place place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) record_bad_width(width, place);
  return lane_index() & ~(width - 1);
}

}  // namespace pygen::simt

#define PYGEN_PLACE ::pygen::simt::Place place = ::pygen::simt::Place::current()

inline void __syncthreads(PYGEN_PLACE) {
  pygen::simt::wait_for_block(pygen::simt::Operation::kSyncthreads, false, place);
}
inline int __syncthreads_or(int predicate, PYGEN_PLACE) {
  using pygen::simt::Operation;
  return pygen::simt::wait_for_block(Operation::kSyncthreadsOr, predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, PYGEN_PLACE) {
  using pygen::simt::Operation;
  return pygen::simt::wait_for_block(Operation::kSyncthreadsAnd, predicate == 0, place) == 0;
}
inline int __syncthreads_count(int predicate, PYGEN_PLACE) {
  using pygen::simt::Operation;
  return static_cast<int>(pygen::simt::wait_for_block(Operation::kSyncthreadsCount, predicate != 0, place));
}
inline void __syncwarp(unsigned mask = ~0u, PYGEN_PLACE) {
  pygen::simt::wait_for_warp(pygen::simt::Operation::kSyncwarp, mask, 0, 0, place);
}
// One OS thread runs the whole grid: only the compiler could reorder.
inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

inline unsigned __ballot_sync(unsigned mask, int predicate, PYGEN_PLACE) {
  using pygen::simt::Operation;
  return static_cast<unsigned>(pygen::simt::wait_for_warp(Operation::kVote, mask, 0, predicate != 0, place));
}
inline int __any_sync(unsigned mask, int predicate, PYGEN_PLACE) { return __ballot_sync(mask, predicate, place) != 0; }
inline int __all_sync(unsigned mask, int predicate, PYGEN_PLACE) {
  return __ballot_sync(mask, predicate == 0, place) == 0;
}

// A lane that would read outside its segment keeps its own value.
#define PYGEN_SHUFFLES(T)                                                                          \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, PYGEN_PLACE) {          \
    const int begin = pygen::simt::segment_begin(width, place);                                    \
    return pygen::simt::shuffle(mask, value, begin + (source & (width - 1)), place);               \
  }                                                                                                \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PYGEN_PLACE) {   \
    const int begin = pygen::simt::segment_begin(width, place);                                    \
    const int lane = pygen::simt::lane_index(), source = lane - static_cast<int>(delta);           \
    return pygen::simt::shuffle(mask, value, source < begin ? lane : source, place);               \
  }                                                                                                \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PYGEN_PLACE) { \
    const int end = pygen::simt::segment_begin(width, place) + width;                              \
    const int lane = pygen::simt::lane_index(), source = lane + static_cast<int>(delta);           \
    return pygen::simt::shuffle(mask, value, source >= end ? lane : source, place);                \
  }                                                                                                \
  inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, PYGEN_PLACE) {   \
    const int end = pygen::simt::segment_begin(width, place) + width;                              \
    const int lane = pygen::simt::lane_index(), source = lane ^ lane_mask;                         \
    return pygen::simt::shuffle(mask, value, source >= end ? lane : source, place);                \
  }
PYGEN_SHUFFLES(int)
PYGEN_SHUFFLES(unsigned)
PYGEN_SHUFFLES(long)
PYGEN_SHUFFLES(unsigned long)
PYGEN_SHUFFLES(long long)
PYGEN_SHUFFLES(unsigned long long)
PYGEN_SHUFFLES(float)
PYGEN_SHUFFLES(double)
#undef PYGEN_SHUFFLES
#undef PYGEN_PLACE

// Stronger than CUDA's relaxed order: ThreadSanitizer does not understand __threadfence, and would
// take the usual "last block finishes the sum" for a race.
#define PYGEN_ATOMICS(T)                                                                                      \
  inline T atomicAdd(T* address, T value) { return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL); }    \
  inline T atomicSub(T* address, T value) { return __atomic_fetch_sub(address, value, __ATOMIC_ACQ_REL); }    \
  inline T atomicExch(T* address, T value) { return __atomic_exchange_n(address, value, __ATOMIC_ACQ_REL); }  \
  inline T atomicAnd(T* address, T value) { return __atomic_fetch_and(address, value, __ATOMIC_ACQ_REL); }    \
  inline T atomicOr(T* address, T value) { return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL); }      \
  inline T atomicCAS(T* address, T expected, T value) {                                                       \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);        \
    return expected;                                                                                          \
  }                                                                                                           \
  inline T atomicMax(T* address, T value) {                                                                   \
    T seen = __atomic_load_n(address, __ATOMIC_ACQUIRE);                                                      \
    while (!__atomic_compare_exchange_n(address, &seen, seen < value ? value : seen, false, __ATOMIC_ACQ_REL, \
                                        __ATOMIC_ACQUIRE)) {                                                  \
    }                                                                                                         \
    return seen;                                                                                              \
  }                                                                                                           \
  inline T atomicMin(T* address, T value) {                                                                   \
    T seen = __atomic_load_n(address, __ATOMIC_ACQUIRE);                                                      \
    while (!__atomic_compare_exchange_n(address, &seen, value < seen ? value : seen, false, __ATOMIC_ACQ_REL, \
                                        __ATOMIC_ACQUIRE)) {                                                  \
    }                                                                                                         \
    return seen;                                                                                              \
  }
PYGEN_ATOMICS(int)
PYGEN_ATOMICS(unsigned)
PYGEN_ATOMICS(unsigned long long)
#undef PYGEN_ATOMICS
// The order of floating-point atomics changes from run to run, and results must repeat.
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<pygen::simt::uint128>(a) * b) >> 64);
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

// Plain overloads, not a template: mixed arguments convert as they do in CUDA. Like fmin and fmax,
// the floating-point ones drop a NaN.
#define PYGEN_MIN_MAX(T)                              \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
PYGEN_MIN_MAX(int)
PYGEN_MIN_MAX(unsigned)
PYGEN_MIN_MAX(long)
PYGEN_MIN_MAX(unsigned long)
PYGEN_MIN_MAX(long long)
PYGEN_MIN_MAX(unsigned long long)
#undef PYGEN_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
