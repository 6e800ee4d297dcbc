// Thread control and the instruction set in use, exported as plain C for the Python module to find.
#include <atomic>
#include <cstdint>

#include "tensor.h"

namespace pygen {
namespace {
std::atomic<int64_t> limit{0};
}
int64_t thread_limit() { return limit.load(std::memory_order_relaxed); }
}  // namespace pygen

#define PYGEN_EXPORT extern "C" __attribute__((visibility("default")))

PYGEN_EXPORT void pygen_set_num_threads(int64_t n) { pygen::limit.store(n, std::memory_order_relaxed); }

PYGEN_EXPORT int64_t pygen_get_num_threads() {
  const int64_t torch = torch::stable::get_num_threads();
  const int64_t own = pygen::thread_limit();
  return own > 0 && own < torch ? own : torch;
}

// Which clone of the row functions the dynamic loader chose.
PYGEN_EXPORT const char* pygen_instruction_set() {
#if PYGEN_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86-64 (built with a compiler that makes no clones)";
#else
  return "compiler default";
#endif
}
