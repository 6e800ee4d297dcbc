// A fiber of simt_fibers.h as the machine sees it: its stack, and how one gives way to another.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>

#include "simt_sanitizers.h"

namespace pygen::simt {

// The scheduler has one too, for the stack of its caller.
struct Fiber {
#ifdef PYGEN_SIMT_SANITIZED
  ucontext_t context;
#else
  ucontext_t start;
  void* jump[5];
  bool fresh;
#endif
  char* stack;
  SanitizerFiber sanitizer;
};

#ifdef PYGEN_SIMT_SANITIZED

// getcontext and setcontext, not swapcontext: AddressSanitizer intercepts that one, and forgets the
// guarded zones of the whole stack it enters.
PYGEN_SIMT_UNSEEN __attribute__((noinline)) inline void switch_fiber(Fiber& from, Fiber& to) {
  volatile bool back = false;
  getcontext(&from.context);
  if (back) return;
  back = true;
  setcontext(&to.context);
}

#else

// The builtins, not _setjmp and _longjmp: with _FORTIFY_SOURCE those check that a jump goes up one
// and the same stack, and abort.
[[noreturn]] __attribute__((noinline)) inline void jump_to(void** buffer) { __builtin_longjmp(buffer, 1); }

// About five times as fast as the other, which asks the kernel for the signal mask.
__attribute__((noinline)) inline void switch_fiber(Fiber& from, Fiber& to) {
  if (__builtin_setjmp(from.jump) != 0) return;
  if (!to.fresh) jump_to(to.jump);
  to.fresh = false;
  setcontext(&to.start);
}

#endif

PYGEN_SIMT_UNSEEN inline void make_fiber(Fiber& fiber, void (*entry)()) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard, PROT_NONE);
  fiber.stack = static_cast<char*>(memory) + guard;
  fiber.sanitizer.create(fiber.stack);
#ifdef PYGEN_SIMT_SANITIZED
  ucontext_t& start = fiber.context;
#else
  ucontext_t& start = fiber.start;
  fiber.fresh = true;
#endif
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, entry, 0);
}

PYGEN_SIMT_UNSEEN inline void drop_fiber(Fiber& fiber) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  fiber.sanitizer.destroy(fiber.stack);
  munmap(fiber.stack - guard, guard + kStackBytes);
}

}  // namespace pygen::simt
