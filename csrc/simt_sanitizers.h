// What the fibers of simt_fibers.h tell AddressSanitizer and ThreadSanitizer; nothing in a plain
// build.
//
// A library built so needs its sanitizer in the process first. AddressSanitizer:
//   LD_PRELOAD=libasan.so ASAN_OPTIONS=detect_leaks=0 python ...
// ThreadSanitizer, which has no room for address randomisation and cannot see PyTorch's locks:
//   LD_PRELOAD=libtsan.so TSAN_OPTIONS=ignore_noninstrumented_modules=1 setarch -R python ...
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __has_feature
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PYGEN_SIMT_SANITIZED 1
#endif

// The scheduler moves between fibers outside every order that a kernel could rely on.
#define PYGEN_SIMT_UNSEEN __attribute__((no_sanitize("thread")))

namespace pygen::simt {
constexpr size_t kStackBytes = 128 * 1024;
}

#if defined(__SANITIZE_THREAD__)

#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace pygen::simt {

// Neighbouring blocks run on different fibers, which never hear of each other within a launch: so a
// race between an even and an odd block shows, and new fibers for each block would cost ten times
// as much.
constexpr int kFiberSets = 2;

struct SanitizerFiber {
  void* handle;

  PYGEN_SIMT_UNSEEN void create(char*) { handle = __tsan_create_fiber(0); }
  PYGEN_SIMT_UNSEEN void destroy(char*) { __tsan_destroy_fiber(handle); }
  PYGEN_SIMT_UNSEEN void adopt_this_thread() { handle = __tsan_get_current_fiber(); }
  PYGEN_SIMT_UNSEEN void leave_for(SanitizerFiber& to, bool synchronise) {
    __tsan_switch_to_fiber(to.handle, synchronise ? 0 : __tsan_switch_to_fiber_no_sync);
  }
  PYGEN_SIMT_UNSEEN void arrive() {}
};

// Words to release to and acquire from. They are new for each block: a word keeps the history of
// all who ever released to it, and would hide a race between blocks.
class SyncWords {
 public:
  PYGEN_SIMT_UNSEEN void begin_block(int threads, int) {
    threads_ = threads;
    words_ = static_cast<uint64_t*>(calloc(static_cast<size_t>(threads + kRing * (kGroups + 1)), sizeof(uint64_t)));
    memset(next_, 0, sizeof(next_));
  }
  PYGEN_SIMT_UNSEEN void end_block() { free(words_); }
  // A ring: a slow lane may not have left the last meeting when the others come to the next.
  PYGEN_SIMT_UNSEEN uint64_t* next_meeting(int group) {
    uint64_t* meeting = words_ + threads_ + kRing * group + next_[group]++ % kRing;
    *meeting = 0;
    return meeting;
  }
  PYGEN_SIMT_UNSEEN void release_arrival(int thread, bool last) {
    __tsan_release(words_ + thread);
    if (last) release_grid();
  }
  PYGEN_SIMT_UNSEEN void acquire_arrival(int thread) { __tsan_acquire(words_ + thread); }
  PYGEN_SIMT_UNSEEN void release(uint64_t* meeting) { __tsan_release(meeting); }
  PYGEN_SIMT_UNSEEN void acquire(uint64_t* meeting) { __tsan_acquire(meeting); }
  PYGEN_SIMT_UNSEEN void release_grid() { __tsan_release(&grid_); }
  PYGEN_SIMT_UNSEEN void acquire_grid() { __tsan_acquire(&grid_); }

 private:
  static constexpr int kRing = 64, kGroups = 32;
  uint64_t* words_ = nullptr;
  int threads_ = 0;
  unsigned next_[kGroups + 1] = {};
  uint64_t grid_ = 0;
};

// Shared memory comes from and goes back to the heap without counting as written by the scheduler.
struct IgnoreMemory {
  PYGEN_SIMT_UNSEEN IgnoreMemory() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  PYGEN_SIMT_UNSEEN ~IgnoreMemory() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace pygen::simt

#else

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pygen::simt {

constexpr int kFiberSets = 1;

struct SyncWords {
  void begin_block(int, int) {}
  void end_block() {}
  uint64_t* next_meeting(int) { return nullptr; }
  void release_arrival(int, bool) {}
  void acquire_arrival(int) {}
  void release(uint64_t*) {}
  void acquire(uint64_t*) {}
  void release_grid() {}
  void acquire_grid() {}
};

struct IgnoreMemory {
  IgnoreMemory() {}
};

#if defined(__SANITIZE_ADDRESS__)

struct SanitizerFiber {
  const void* bottom;
  size_t size;
  void* fake_stack;
  SanitizerFiber* came_from;

  void create(char* stack) {
    bottom = stack;
    size = kStackBytes;
    fake_stack = nullptr;
  }
  // An abandoned stack leaves the guarded zones of its frames behind, and the next mapping may lie
  // at the same place.
  void destroy(char* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
  void adopt_this_thread() {}
  void leave_for(SanitizerFiber& to, bool) {
    to.came_from = this;
    __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
  }
  // The scheduler learns its own bounds here, as what the fiber it resumed came from.
  void arrive() { __sanitizer_finish_switch_fiber(fake_stack, &came_from->bottom, &came_from->size); }
};

#else

struct SanitizerFiber {
  void create(char*) {}
  void destroy(char*) {}
  void adopt_this_thread() {}
  void leave_for(SanitizerFiber&, bool) {}
  void arrive() {}
};

#endif

}  // namespace pygen::simt

#endif
