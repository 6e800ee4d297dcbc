// Addressed noise of one block of four elements: normal numbers by Box and Muller (1958, Ann. Math. Statist. 29),
// z = sqrt(-2 ln u) (cos a, sin a), and uniform ones.
//
// The bits are a promise, as those of philox.h are. So every step is an operation that IEEE 754 rounds one way (the
// files that include this are built without contraction of a*b+c), the logarithm is its own rather than that of
// scalar.h, which may improve, and noise_reference in pygen/ops/noise.py repeats the steps one by one.
#pragma once

#include <cmath>

#include "philox.h"

namespace pygen {

struct NormalPair {
  float first, second;
};

// The radius has 31 bits of u = (word/2 + 1/2) 2^-31 in [2^-32, 1], so the tails reach 6.66; the signed conversion is
// the one that every instruction set has. The angle is that of a quadrant (the top two bits) and of a fraction f of a
// quadrant in [-1/2, 1/2), where short polynomials serve for sine and cosine.
PYGEN_INLINE NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const float u = (static_cast<float>(static_cast<int32_t>(radius_word >> 1)) + 0.5f) * 4.656612873077392578125e-10f;
  // u = 2^e (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)); -2 ln(1 + t) = -2 t + t^2 + t^3 p(t), within 3.2e-8 relative.
  const int32_t bits = static_cast<int32_t>(scalar::bits_of(u) - 0x3f3504f3u);
  const float exponent = static_cast<float>(bits >> 23);
  const float t = scalar::float_of((static_cast<uint32_t>(bits) & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float t_square = t * t;
  float p = t * -0.17400719225406647f + 0.2853495180606842f;
  p = p * t + -0.2982957363128662f;
  p = p * t + 0.331551730632782f;
  p = p * t + -0.3992612361907959f;
  p = p * t + 0.5000267624855042f;
  p = p * t + -0.6666781902313232f;
  const float square = exponent * -1.3862943649291992f + (p * t * t_square + t_square + t * -2.0f);
#if defined(__CUDA_ARCH__)
  const float radius = __fsqrt_rn(square);
#else
  const float radius = ::sqrtf(square);
#endif

  // sin and cos of f quadrants, within 3.3e-9 relative and 3.2e-8.
  const float f = static_cast<float>(static_cast<int32_t>(angle_word << 2)) * 2.3283064365386962890625e-10f;
  const float f_square = f * f;
  const float sine = (((f_square * -0.004601669f + 0.07968004f) * f_square + -0.6459635f) * f_square + 1.5707964f) * f;
  const float cosine = ((f_square * -0.020426251f + 0.25360635f) * f_square + -1.233698f) * f_square + 1.0f;
  const bool odd = (angle_word & 0x40000000u) != 0;
  // Quadrants 1 and 2 have a negative first coordinate, 2 and 3 a negative second.
  const uint32_t first_sign = (angle_word ^ (angle_word << 1)) & 0x80000000u;
  const uint32_t second_sign = angle_word & 0x80000000u;
  const float first = scalar::float_of(scalar::bits_of(odd ? sine : cosine) ^ first_sign);
  const float second = scalar::float_of(scalar::bits_of(odd ? cosine : sine) ^ second_sign);
  return {radius * first, radius * second};
}

// Elements 4 block .. 4 block + 3 of a draw.
template <NoiseStream S, class Lane = uint32_t>
PYGEN_INLINE void noise_block(uint64_t seed, uint64_t sample_id, uint64_t draw, uint32_t block, float (&values)[4]) {
  const PhiloxWords words = philox<Lane>(seed, sample_id, S, draw, block);
  if constexpr (S == NoiseStream::kNormal) {
    const NormalPair low = normal_pair(words.w0, words.w1), high = normal_pair(words.w2, words.w3);
    values[0] = low.first;
    values[1] = low.second;
    values[2] = high.first;
    values[3] = high.second;
  } else {
    values[0] = uniform_of_word(words.w0);
    values[1] = uniform_of_word(words.w1);
    values[2] = uniform_of_word(words.w2);
    values[3] = uniform_of_word(words.w3);
  }
}

// Blocks first .. first + blocks - 1, 4 * blocks values: the loop that the compiler vectorises across blocks.
template <NoiseStream S, class Lane>
PYGEN_INLINE void noise_blocks(uint64_t seed, uint64_t sample_id, uint64_t draw, uint32_t first, int64_t blocks,
                               float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    float values[4];
    noise_block<S, Lane>(seed, sample_id, draw, first + static_cast<uint32_t>(i), values);
    out[4 * i] = values[0];
    out[4 * i + 1] = values[1];
    out[4 * i + 2] = values[2];
    out[4 * i + 3] = values[3];
  }
}

// Where the noise of each row is: plain numbers for all rows, or one element per row (stride 0 for one that all share).
struct NoiseAddresses {
  const int64_t* sample_ids = nullptr;
  const int64_t* seeds = nullptr;  // null: `seed` for all rows
  const int64_t* draws = nullptr;  // null: `draw` for all rows
  int64_t sample_id_stride = 0, seed_stride = 0, draw_stride = 0;
  int64_t seed = 0, draw = 0;

  PYGEN_INLINE uint64_t sample_id_of(int64_t row) const {
    return static_cast<uint64_t>(sample_ids[row * sample_id_stride]);
  }
  PYGEN_INLINE uint64_t seed_of(int64_t row) const {
    return static_cast<uint64_t>(seeds ? seeds[row * seed_stride] : seed);
  }
  PYGEN_INLINE uint64_t draw_of(int64_t row) const {
    return static_cast<uint64_t>(draws ? draws[row * draw_stride] : draw);
  }
};

// Elements start .. start + n - 1 of a row's normal noise, start a multiple of 4; the loop of noise.cpp.
void normal_rows(const NoiseAddresses& addresses, int64_t row, int64_t start, int64_t n, float* out);

}  // namespace pygen
