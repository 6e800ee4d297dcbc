// Scalar functions for host and device: exp, log, tanh, sigmoid, softplus, atan in float by branch-free polynomials
// that the compiler vectorises, in double by the system's library. No torch here.
//
// The polynomials are weighted minimax fits (Lawson's iteration on a Chebyshev basis, in double, then rounded); the
// error of each function over all floats is tested in tests/test_scalar.py. NaN in gives NaN out; infinities, overflow
// and denormals follow the C functions, except that sigmoid flushes results below 2^-126 to zero.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define PYGEN_INLINE __host__ __device__ __forceinline__
#else
#define PYGEN_INLINE inline __attribute__((always_inline))
#endif

// Before a loop over elements taken together, the CPU's vector lanes: they are independent, also where results
// overwrite what they are computed from.
#if defined(__CUDACC__)
#define PYGEN_LANES
#else
#define PYGEN_LANES _Pragma("omp simd")
#endif

// One clone of a row function per instruction set, chosen by the dynamic loader. GCC knows the x86-64 levels from
// version 12 on; without them, with Clang, on Arm and where there is no ifunc, there is one version: the compiler's
// default.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__CUDACC__)
#define PYGEN_X86_LEVELS 1
#else
#define PYGEN_X86_LEVELS 0
#endif
// Sanitizers instrument ifunc resolvers, which run before they are ready.
#if PYGEN_X86_LEVELS && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PYGEN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define PYGEN_CLONES
#endif

namespace pygen::scalar {

PYGEN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

PYGEN_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// 16-bit floats from their bits, in integers: through their classes a loop of conversions does not vectorise.
PYGEN_INLINE float float_of_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

PYGEN_INLINE float float_of_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, denormals included; infinity and NaN need theirs set.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= (31u << 23) ? magnitude | 0x7f800000u : finite;
  return float_of(value | static_cast<uint32_t>(half & 0x8000) << 16);
}

// Written so that a NaN in the first argument comes through, which fmin and fmax would drop.
PYGEN_INLINE float at_most(float x, float high) { return x > high ? high : x; }
PYGEN_INLINE float at_least(float x, float low) { return x < low ? low : x; }
PYGEN_INLINE double at_most(double x, double high) { return x > high ? high : x; }
PYGEN_INLINE double at_least(double x, double low) { return x < low ? low : x; }

// first ? a : b in a loop over memory. As a conditional expression GCC makes it a branch around the loads, and the loop
// stays scalar.
#if defined(__CUDACC__)
template <class T>
PYGEN_INLINE T pick(bool first, T a, T b) {
  return first ? a : b;
}
#else
PYGEN_INLINE float pick(bool first, float a, float b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}
PYGEN_INLINE double pick(bool first, double a, double b) {
  const uint64_t mask = uint64_t{0} - static_cast<uint64_t>(first);
  return std::bit_cast<double>((std::bit_cast<uint64_t>(a) & mask) | (std::bit_cast<uint64_t>(b) & ~mask));
}
#endif

PYGEN_INLINE float abs(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
PYGEN_INLINE double abs(double x) { return ::fabs(x); }

PYGEN_INLINE float with_sign_of(float magnitude, float sign) {
  return float_of((bits_of(magnitude) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}
PYGEN_INLINE double with_sign_of(double magnitude, double sign) { return ::copysign(magnitude, sign); }

// e^x = 2^n (1 + rest), where 1 + rest = e^r with |r| <= ln(2)/2; for |x| up to some hundred.
struct PowerOfE {
  float rest;
  int32_t n;
};
PYGEN_INLINE PowerOfE power_of_e(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 0.0013942160876467824f;
  p = p * r + 0.008363775908946991f;
  p = p * r + 0.041666362434625626f;
  p = p * r + 0.16666573286056519f;
  p = p * r + 0.5f;
  return {r + r * r * p, static_cast<int32_t>(bits_of(shifted)) - static_cast<int32_t>(bits_of(kRound))};
}

// 2^n, a normal number.
PYGEN_INLINE float power_of_2(int32_t n) { return float_of(static_cast<uint32_t>(n + 127) << 23); }

PYGEN_INLINE float exp(float x) {
  const PowerOfE power = power_of_e(at_least(at_most(x, 89.0f), -104.0f));
  // 2^n in two factors, because n reaches -150 and 128, outside what one float exponent holds.
  const int32_t half = power.n >> 1;
  return (1.0f + power.rest) * power_of_2(half) * power_of_2(power.n - half);
}
PYGEN_INLINE double exp(double x) { return ::exp(x); }

// log x = e ln 2 + 2 atanh(s), s = (m-1)/(m+1), x = 2^e m, m in [sqrt(1/2), sqrt(2)).
PYGEN_INLINE float log(float x) {
  const bool denormal = x < 1.17549435e-38f;
  const float scaled = denormal ? x * 8388608.0f : x;
  const uint32_t shifted = bits_of(scaled) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23) - (denormal ? 23.0f : 0.0f);
  const float f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  float p = 0.2335541844367981f;
  p = p * z + 0.28549879789352417f;
  p = p * z + 0.40000131726264954f;
  p = p * z + 0.6666666865348816f;
  // 2s = f - s f exactly, so the large part of the sum stays unrounded.
  float value = e * 0.693145752f + (f - (s * (f - z * p) - e * 1.42860677e-6f));
  value = x == 0.0f ? -std::numeric_limits<float>::infinity() : value;
  value = x < 0.0f ? std::numeric_limits<float>::quiet_NaN() : value;
  return x < std::numeric_limits<float>::infinity() ? value : x;  // +inf and NaN come back as they are
}
PYGEN_INLINE double log(double x) { return ::log(x); }

// log(1 + u) for u in [0, 1], by the same series with s = u/(2+u) <= 1/3.
PYGEN_INLINE float log1p_unit(float u) {
  const float s = u / (2.0f + u);
  const float z = s * s;
  float p = 0.20881173014640808f;
  p = p * z + 0.1744042932987213f;
  p = p * z + 0.22266902029514313f;
  p = p * z + 0.28570225834846497f;
  p = p * z + 0.40000012516975403f;
  p = p * z + 0.6666666865348816f;
  return u - s * (u - z * p);
}
PYGEN_INLINE double log1p_unit(double u) { return ::log1p(u); }

PYGEN_INLINE float tanh(float x) {
  const float a = abs(x);
  const float z = x * x;
  float p = 0.002289308700710535f;
  p = p * z - 0.008341534063220024f;
  p = p * z + 0.021768420934677124f;
  p = p * z - 0.053959235548973083f;
  p = p * z + 0.13333304226398468f;
  p = p * z - 0.3333333432674408f;
  const float small = x + x * z * p;
  const float large = with_sign_of(1.0f - 2.0f / (exp(2.0f * at_most(a, 10.0f)) + 1.0f), x);
  return a < 0.625f ? small : large;
}
PYGEN_INLINE double tanh(double x) { return ::tanh(x); }

template <class T>
PYGEN_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

// log(1 + e^x)
template <class T>
PYGEN_INLINE T softplus(T x) {
  return at_least(x, T(0)) + log1p_unit(exp(-abs(x)));
}

PYGEN_INLINE float atan(float x) {
  const float a = abs(x);
  const bool outside = a > 1.0f;
  const float t = outside ? 1.0f / a : a;
  const float z = t * t;
  float p = -0.0025085764937102795f;
  p = p * z + 0.013996483758091927f;
  p = p * z - 0.03667028620839119f;
  p = p * z + 0.06318219751119614f;
  p = p * z - 0.08689044415950775f;
  p = p * z + 0.1104203537106514f;
  p = p * z - 0.14279615879058838f;
  p = p * z + 0.1999979019165039f;
  p = p * z - 0.3333333134651184f;
  const float inside = t + t * z * p;
  return with_sign_of(outside ? 1.57079633f - inside : inside, x);
}
PYGEN_INLINE double atan(double x) { return ::atan(x); }

}  // namespace pygen::scalar
