// Prints, for tests/test_philox.py, the words of Philox and the bits of a loop of noise.h, as this build makes them:
//   words C0 C1 C2 C3 K0 K1        four words of philox4x32_10
//   uniform SEED ID STREAM DRAW E  bits of philox_uniform, and of philox_uniform53
//   normal SEED ID DRAW FIRST N    bits of N blocks of normal noise, four a line, in lanes of 32 bits
//   wide SEED ID DRAW FIRST N      the same in lanes of 64 bits
//   pair W0 W1                     bits of normal_pair
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "noise.h"

int main(int count, char** arguments) {
  const std::string what = arguments[1];
  std::vector<uint64_t> n;
  for (int i = 2; i < count; ++i) n.push_back(std::strtoull(arguments[i], nullptr, 0));
  auto word = [&](size_t i) { return static_cast<uint32_t>(n[i]); };
  if (what == "words") {
    const auto w = pygen::philox4x32_10({word(0), word(1), word(2), word(3)}, word(4), word(5));
    std::printf("%08x %08x %08x %08x\n", w.w0, w.w1, w.w2, w.w3);
  } else if (what == "uniform") {
    const auto stream = static_cast<pygen::NoiseStream>(n[2]);
    const float u = pygen::philox_uniform(n[0], n[1], stream, n[3], n[4]);
    std::printf("%.17g %.17g\n", static_cast<double>(u), pygen::philox_uniform53(n[0], n[1], stream, n[3]));
  } else if (what == "normal" || what == "wide") {
    std::vector<float> values(4 * n[4]);
    constexpr auto kNormal = pygen::NoiseStream::kNormal;
    auto blocks = what == "wide" ? &pygen::noise_blocks<kNormal, uint64_t> : &pygen::noise_blocks<kNormal, uint32_t>;
    blocks(n[0], n[1], n[2], word(3), static_cast<int64_t>(n[4]), values.data());
    for (size_t i = 0; i < values.size(); ++i) {
      std::printf("%08x%c", pygen::scalar::bits_of(values[i]), i % 4 == 3 ? '\n' : ' ');
    }
  } else {
    const auto pair = pygen::normal_pair(word(0), word(1));
    std::printf("%08x %08x\n", pygen::scalar::bits_of(pair.first), pygen::scalar::bits_of(pair.second));
  }
}
