// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11), and where a random number
// lives in its counter. Integers only: the same words on every machine. No torch here.
//
//   key      word 0, 1   seed, low and high half
//   counter  word 0      block: element / 4
//            word 1      draw in bits 0-29; stream in bits 30-31: 0 normal, 1 uniform, 2 token, 3 free
//            word 2, 3   sample id, low and high half
//   element  word element % 4 of the result; a normal pair takes words 0, 1 or 2, 3
//
// The layout is a promise: whoever changes it changes every sample that was ever made under a seed.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace pygen {

enum class NoiseStream : uint32_t { kNormal = 0, kUniform = 1, kToken = 2 };

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// A word in a Lane of 64 bits, whose upper half is never looked at, takes fewer instructions where a vector holds many
// (AVX-512: 0.34 against 0.66 ns a word); narrower vectors and CUDA do better with 32.
template <class Lane = uint32_t>
PYGEN_INLINE PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  Lane w0 = counter.w0, w1 = counter.w1, w2 = counter.w2, w3 = counter.w3;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * static_cast<uint32_t>(w0);
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * static_cast<uint32_t>(w2);
    w0 = static_cast<Lane>(product1 >> 32) ^ w1 ^ key0;
    w1 = static_cast<Lane>(product1);
    w2 = static_cast<Lane>(product0 >> 32) ^ w3 ^ key1;
    w3 = static_cast<Lane>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {static_cast<uint32_t>(w0), static_cast<uint32_t>(w1), static_cast<uint32_t>(w2), static_cast<uint32_t>(w3)};
}

// The four words of one block; bits of `draw` above the thirtieth are dropped.
template <class Lane = uint32_t>
PYGEN_INLINE PhiloxWords philox(uint64_t seed, uint64_t sample_id, NoiseStream stream, uint64_t draw, uint32_t block) {
  const uint32_t word1 = (static_cast<uint32_t>(draw) & 0x3fffffffu) | (static_cast<uint32_t>(stream) << 30);
  return philox4x32_10<Lane>({block, word1, static_cast<uint32_t>(sample_id), static_cast<uint32_t>(sample_id >> 32)},
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A multiple of 2^-24 in [0, 1).
PYGEN_INLINE float uniform_of_word(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-8f;
}

// One uniform number by address, for kernels that need a few; element < 2^34.
PYGEN_INLINE float philox_uniform(uint64_t seed, uint64_t sample_id, NoiseStream stream, uint64_t draw,
                                  uint64_t element) {
  const PhiloxWords words = philox(seed, sample_id, stream, draw, static_cast<uint32_t>(element >> 2));
  const uint32_t low = element & 1 ? words.w1 : words.w0;
  const uint32_t high = element & 1 ? words.w3 : words.w2;
  return uniform_of_word(element & 2 ? high : low);
}

// A multiple of 2^-53 in [0, 1): 27 bits of one word, 26 of another.
PYGEN_INLINE double uniform53_of_words(uint32_t high, uint32_t low) {
  const uint64_t bits = (static_cast<uint64_t>(high >> 5) << 26) | (low >> 6);
  return static_cast<double>(bits) * 1.1102230246251565e-16;
}

// The same from words 0 and 1 of block 0.
PYGEN_INLINE double philox_uniform53(uint64_t seed, uint64_t sample_id, NoiseStream stream, uint64_t draw) {
  const PhiloxWords words = philox(seed, sample_id, stream, draw, 0);
  return uniform53_of_words(words.w0, words.w1);
}

}  // namespace pygen
