// What a launch may ask for on the host: CUDA's limits, an order of threads, shared memory.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simt_intrinsics.h"
#include "simt_sanitizers.h"

namespace pygen::simt {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;

inline void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  char text[200] = "";
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    snprintf(text, sizeof(text), "launch: block is (%u, %u, %u), expected 1 to 1024 threads and z up to 64", block.x,
             block.y, block.z);
  } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    snprintf(text, sizeof(text), "launch: grid is (%u, %u, %u), expected x up to 2147483647, y and z up to 65535",
             grid.x, grid.y, grid.z);
  } else if (shared_bytes > kMostShared) {
    snprintf(text, sizeof(text), "launch: %zu bytes of shared memory, expected %zu at most", shared_bytes, kMostShared);
  }
  if (text[0] != '\0') throw std::runtime_error(text);
}

inline bool descending_order() {
  const char* order = getenv("PYGEN_SIMT_ORDER");
  if (order == nullptr || strcmp(order, "ascending") == 0) return false;
  if (strcmp(order, "descending") == 0) return true;
  throw std::runtime_error(std::string("PYGEN_SIMT_ORDER is '") + order + "', expected ascending or descending");
}

// Heap blocks, each of its exact size, so that AddressSanitizer guards both ends of every array (it
// misses an overflow of a thread_local one). An array is known by a static address in its kernel.
class SharedMemory {
 public:
  PYGEN_SIMT_UNSEEN void begin_grid(size_t dynamic_bytes) { dynamic_bytes_ = dynamic_bytes; }

  PYGEN_SIMT_UNSEEN void begin_block() {
    count_ = 0;
    static_bytes_ = 0;
    dynamic_ = dynamic_bytes_ > 0 ? allocate(dynamic_bytes_, 16) : nullptr;
  }

  PYGEN_SIMT_UNSEEN void end_block() {
    IgnoreMemory ignore;
    for (int i = 0; i < count_; ++i) free(arrays_[i].memory);
    free(dynamic_);
  }

  PYGEN_SIMT_UNSEEN void* array(const void* key, size_t bytes, size_t alignment) {
    for (int i = 0; i < count_; ++i) {
      if (arrays_[i].key == key) return arrays_[i].memory;
    }
    if (count_ == kMaxArrays) {
      fprintf(stderr, "pygen simt: a kernel has more than %d shared arrays\n", kMaxArrays);
      abort();
    }
    static_bytes_ += bytes;
    arrays_[count_] = {key, allocate(bytes, alignment)};
    return arrays_[count_++].memory;
  }

  PYGEN_SIMT_UNSEEN void* dynamic() const { return dynamic_; }
  PYGEN_SIMT_UNSEEN size_t static_bytes() const { return static_bytes_; }
  PYGEN_SIMT_UNSEEN size_t dynamic_bytes() const { return dynamic_bytes_; }
  PYGEN_SIMT_UNSEEN bool over_limit() const {
    return static_bytes_ > kMostStaticShared || static_bytes_ + dynamic_bytes_ > kMostShared;
  }

 private:
  static constexpr int kMaxArrays = 64;
  struct Array {
    const void* key;
    void* memory;
  };

  PYGEN_SIMT_UNSEEN static void* allocate(size_t bytes, size_t alignment) {
    IgnoreMemory ignore;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) abort();
    // What no thread has written reads as NaN, or as -1.
    memset(memory, 0xFF, bytes);
    return memory;
  }

  Array arrays_[kMaxArrays];
  int count_ = 0;
  size_t static_bytes_ = 0, dynamic_bytes_ = 0;
  void* dynamic_ = nullptr;
};

}  // namespace pygen::simt
