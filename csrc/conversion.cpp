// Rows of bfloat16 and float16 to float and back, rounded to nearest even, as integer arithmetic that the compiler
// vectorises on every instruction set; through PyTorch's scalar classes it does not.
#include "scalar.h"
#include "tensor.h"

namespace pygen {
namespace {

PYGEN_CLONES void widen_bfloat16(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = scalar::float_of(static_cast<uint32_t>(from[i]) << 16);
}

PYGEN_CLONES void narrow_bfloat16(const float* __restrict from, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = scalar::bits_of(from[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

PYGEN_CLONES void widen_half(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = from[i] & 0x7fffu, sign = static_cast<uint32_t>(from[i] & 0x8000u) << 16;
    // The product moves the exponent's bias from 15 to 127, and makes normal numbers of half's denormals.
    const uint32_t finite = scalar::bits_of(scalar::float_of(magnitude << 13) * 5.192296858534828e33f);  // 2^112
    const uint32_t special = 0x7f800000u | (magnitude << 13);
    to[i] = scalar::float_of((magnitude >= 0x7c00u ? special : finite) | sign);
  }
}

PYGEN_CLONES void narrow_half(const float* __restrict from, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = scalar::bits_of(from[i]), magnitude = bits & 0x7fffffffu;
    // Adding 1/2 leaves a unit of 2^-24, that of half's denormals, in the last place: the addition rounds.
    const uint32_t denormal = scalar::bits_of(scalar::float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;  // 2^-14
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;             // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    to[i] = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
  }
}

}  // namespace

void widen_rows(const BFloat16* from, int64_t n, float* to) {
  widen_bfloat16(reinterpret_cast<const uint16_t*>(from), n, to);
}
void widen_rows(const Half* from, int64_t n, float* to) { widen_half(reinterpret_cast<const uint16_t*>(from), n, to); }
void narrow_rows(const float* from, int64_t n, BFloat16* to) {
  narrow_bfloat16(from, n, reinterpret_cast<uint16_t*>(to));
}
void narrow_rows(const float* from, int64_t n, Half* to) { narrow_half(from, n, reinterpret_cast<uint16_t*>(to)); }

}  // namespace pygen
