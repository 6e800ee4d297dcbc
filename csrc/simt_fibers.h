// Runs a CUDA grid on the CPU for tests: the blocks one after another, the threads of a block as
// fibers that stop at barriers, shuffles and votes and nowhere else.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "simt_intrinsics.h"
#include "simt_launch.h"
#include "simt_sanitizers.h"
#include "simt_stacks.h"

namespace pygen::simt {

enum class State : uint8_t { kReady, kAtBlock, kAtWarp, kGone };

struct Thread {
  Fiber* fiber;
  uint3 index;
  State state;
  Operation operation;
  unsigned mask;
  int source_lane;
  uint64_t sent, received;
  Place place;
  uint64_t* meeting;
};

struct Warp {
  unsigned live, ready, waiting;
};

class Scheduler {
 public:
  Scheduler() : threads_(new Thread[kMaxThreads]), fibers_(new Fiber[kFiberSets * kMaxThreads]) {}
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;
  ~Scheduler() {
    drop_fibers();
    delete[] threads_;
    delete[] fibers_;
  }

  static Scheduler& of_this_thread() {
    static thread_local Scheduler scheduler;
    return scheduler;
  }

  PYGEN_SIMT_UNSEEN void run_grid(void (*call)(void*), void* body, dim3 grid, dim3 block, size_t shared_bytes);
  PYGEN_SIMT_UNSEEN unsigned wait_for_block(Operation operation, bool predicate, Place place);
  PYGEN_SIMT_UNSEEN uint64_t wait_for_warp(Operation operation, unsigned mask, int source_lane, uint64_t sent,
                                           Place place);
  PYGEN_SIMT_UNSEEN void* static_shared(const void* key, size_t bytes, size_t alignment);
  PYGEN_SIMT_UNSEEN void* dynamic_shared() { return shared_.dynamic(); }
  PYGEN_SIMT_UNSEEN int lane() const { return static_cast<int>(current_ - threads_) % 32; }
  PYGEN_SIMT_UNSEEN void record_bad_width(int width, Place place) {
    record("%s shuffles at %s:%u with width %d, which is not a power of two up to 32", name(*current_).text,
           place.file_name(), place.line(), width);
  }

 private:
  struct Name {
    char text[96];
  };

  PYGEN_SIMT_UNSEEN void run_block(Fiber* fibers);
  PYGEN_SIMT_UNSEEN void run_warp(int warp);
  PYGEN_SIMT_UNSEEN void release_block();
  PYGEN_SIMT_UNSEEN void release_warp_if_met(int warp, unsigned mask);
  PYGEN_SIMT_UNSEEN void record_deadlock();
  PYGEN_SIMT_UNSEEN void resume(Thread& thread);
  PYGEN_SIMT_UNSEEN void stop(State state);
  PYGEN_SIMT_UNSEEN void meet(int first, int last, unsigned mask);
  PYGEN_SIMT_UNSEEN void make_fibers(int set, int count);
  PYGEN_SIMT_UNSEEN void drop_fibers();
  PYGEN_SIMT_UNSEEN void record(const char* format, ...) __attribute__((format(printf, 2, 3)));
  PYGEN_SIMT_UNSEEN Name name(const Thread& thread) const;
  PYGEN_SIMT_UNSEEN static void live_on_fiber();

  // Plain arrays: ThreadSanitizer sees into the standard containers even where it is told to look
  // away, and would report the scheduler itself.
  Thread* threads_;
  Fiber* fibers_;
  Fiber home_{};
  int fiber_counts_[kFiberSets] = {};

  void (*call_)(void*) = nullptr;
  void* body_ = nullptr;
  Thread* current_ = nullptr;
  Warp warps_[kMaxWarps];
  int thread_count_ = 0, warp_count_ = 0, live_ = 0, at_barrier_ = 0;
  unsigned barrier_count_ = 0;
  bool descending_ = false;

  SharedMemory shared_;
  SyncWords sync_;
  char fault_[1024] = "";
};

inline void Scheduler::run_grid(void (*call)(void*), void* body, dim3 grid, dim3 block, size_t shared_bytes) {
  call_ = call;
  body_ = body;
  descending_ = descending_order();
  shared_.begin_grid(shared_bytes);
  thread_count_ = static_cast<int>(block.x * block.y * block.z);
  warp_count_ = (thread_count_ + 31) / 32;
  fault_[0] = '\0';
  home_.sanitizer.adopt_this_thread();
  blockDim = block;
  gridDim = grid;
  for (int i = 0; i < thread_count_; ++i) {
    const unsigned rank = static_cast<unsigned>(i);
    threads_[i].index = {rank % block.x, rank / block.x % block.y, rank / (block.x * block.y)};
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && fault_[0] == '\0'; ++i) {
    const uint64_t rank = descending_ ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(rank % grid.x), static_cast<unsigned>(rank / grid.x % grid.y),
                static_cast<unsigned>(rank / (uint64_t{grid.x} * grid.y))};
    const int set = static_cast<int>(i % kFiberSets);
    make_fibers(set, thread_count_);
    run_block(fibers_ + set * kMaxThreads);
  }
  sync_.acquire_grid();
  if (fault_[0] != '\0') throw std::runtime_error(fault_);
}

inline void Scheduler::run_block(Fiber* fibers) {
  shared_.begin_block();
  sync_.begin_block(thread_count_, warp_count_);
  for (int w = 0; w < warp_count_; ++w) {
    const int lanes = thread_count_ - 32 * w;
    const unsigned all = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warps_[w] = {all, all, 0};
  }
  for (int i = 0; i < thread_count_; ++i) {
    threads_[i].fiber = &fibers[i];
    threads_[i].state = State::kReady;
    threads_[i].meeting = nullptr;
  }
  live_ = thread_count_;
  at_barrier_ = 0;
  for (;;) {
    for (int w = 0; w < warp_count_; ++w) run_warp(descending_ ? warp_count_ - 1 - w : w);
    if (live_ == 0) break;
    if (at_barrier_ < live_) {
      record_deadlock();
      for (int i = 0; i < thread_count_; ++i) sync_.acquire_arrival(i);
      // The stacks still hold the kernel's frames, which nothing can unwind.
      drop_fibers();
      break;
    }
    release_block();
  }
  sync_.end_block();
  shared_.end_block();
}

inline void Scheduler::run_warp(int warp) {
  Warp& w = warps_[warp];
  while (w.ready != 0) {
    // Every lane ready now runs before any lane runs twice.
    for (unsigned round = w.ready; round != 0;) {
      const int lane = descending_ ? 31 - std::countl_zero(round) : std::countr_zero(round);
      const unsigned bit = 1u << lane;
      round &= ~bit;
      w.ready &= ~bit;
      Thread& thread = threads_[32 * warp + lane];
      resume(thread);
      if (thread.state == State::kAtWarp) {
        w.waiting |= bit;
        release_warp_if_met(warp, thread.mask);
      } else if (thread.state == State::kAtBlock) {
        ++at_barrier_;
      } else {
        w.live &= ~bit;
        --live_;
        for (unsigned left = w.waiting; left != 0; left &= left - 1) {
          const int waiter = std::countr_zero(left);
          if (w.waiting >> waiter & 1) {
            release_warp_if_met(warp, threads_[32 * warp + waiter].mask);
          }
        }
      }
    }
  }
}

inline void Scheduler::release_warp_if_met(int warp, unsigned mask) {
  Warp& w = warps_[warp];
  Thread* lanes = threads_ + 32 * warp;
  const unsigned group = mask & w.live;
  if (group == 0 || (group & ~w.waiting) != 0) return;
  const Thread& first = lanes[std::countr_zero(group)];
  unsigned votes = 0;
  for (unsigned left = group; left != 0; left &= left - 1) {
    const Thread& thread = lanes[std::countr_zero(left)];
    if (thread.mask != mask) return;
    if (thread.sent != 0) votes |= left & -left;
  }
  for (unsigned left = group; left != 0; left &= left - 1) {
    Thread& thread = lanes[std::countr_zero(left)];
    if (thread.operation != first.operation) {
      record("%s and %s meet in different warp operations, at %s:%u and %s:%u", name(first).text, name(thread).text,
             first.place.file_name(), first.place.line(), thread.place.file_name(), thread.place.line());
    }
    thread.received = votes;
    if (thread.operation == Operation::kShuffle) {
      const int source = thread.source_lane;
      // An arbitrary bit pattern (NaN as a float) stands for what CUDA leaves undefined.
      thread.received = ~uint64_t{0};
      if (source >= 0 && source < 32 && (group >> source & 1) != 0) {
        thread.received = lanes[source].sent;
      } else {
        record("%s shuffles at %s:%u from lane %d, which %s", name(thread).text, thread.place.file_name(),
               thread.place.line(), source,
               source < 0 || source > 31     ? "does not exist"
               : (w.live >> source & 1) == 0 ? "has exited or never was"
                                             : "its mask does not name");
      }
    }
    thread.state = State::kReady;
  }
  if (first.operation == Operation::kSyncwarp) {
    uint64_t* meeting = sync_.next_meeting(warp);
    for (unsigned left = group; left != 0; left &= left - 1) {
      lanes[std::countr_zero(left)].meeting = meeting;
    }
  }
  w.waiting &= ~group;
  w.ready |= group;
}

inline void Scheduler::release_block() {
  const Thread* first = nullptr;
  uint64_t* meeting = sync_.next_meeting(kMaxWarps);
  for (int i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    if (thread.state == State::kGone) continue;
    if (first == nullptr) first = &thread;
    if (thread.operation != first->operation || thread.place.line() != first->place.line() ||
        strcmp(thread.place.file_name(), first->place.file_name()) != 0) {
      record("%s and %s stand at different block barriers, at %s:%u and %s:%u", name(*first).text, name(thread).text,
             first->place.file_name(), first->place.line(), thread.place.file_name(), thread.place.line());
    }
    thread.state = State::kReady;
    thread.meeting = meeting;
    warps_[i / 32].ready |= 1u << (i % 32);
  }
  unsigned count = 0;
  for (int i = 0; i < thread_count_; ++i) {
    if (threads_[i].state == State::kReady && threads_[i].sent != 0) ++count;
  }
  barrier_count_ = count;
  at_barrier_ = 0;
}

inline void Scheduler::record_deadlock() {
  for (int i = 0; i < thread_count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state != State::kAtWarp) continue;
    const Warp& w = warps_[i / 32];
    for (unsigned left = thread.mask & w.live; left != 0; left &= left - 1) {
      const Thread& other = threads_[i / 32 * 32 + std::countr_zero(left)];
      if (other.state == State::kAtWarp && other.mask == thread.mask) continue;
      if (other.state == State::kAtBlock) {
        record("%s waits at %s:%u (mask 0x%08x) for %s, which stands at a block barrier at %s:%u", name(thread).text,
               thread.place.file_name(), thread.place.line(), thread.mask, name(other).text, other.place.file_name(),
               other.place.line());
      } else {
        record("%s waits at %s:%u with mask 0x%08x for %s, which waits at %s:%u with mask 0x%08x", name(thread).text,
               thread.place.file_name(), thread.place.line(), thread.mask, name(other).text, other.place.file_name(),
               other.place.line(), other.mask);
      }
      return;
    }
  }
  record("the block cannot go on");
}

inline unsigned Scheduler::wait_for_block(Operation operation, bool predicate, Place place) {
  Thread& thread = *current_;
  thread.operation = operation;
  thread.sent = predicate;
  thread.place = place;
  stop(State::kAtBlock);
  if (thread.meeting != nullptr) meet(0, thread_count_, ~0u);
  return barrier_count_;
}

inline uint64_t Scheduler::wait_for_warp(Operation operation, unsigned mask, int source_lane, uint64_t sent,
                                         Place place) {
  Thread& thread = *current_;
  const int own = lane();
  if ((mask >> own & 1) == 0) {
    record("%s calls a warp operation at %s:%u with mask 0x%08x, which does not name its own lane", name(thread).text,
           place.file_name(), place.line(), mask);
    return sent;
  }
  thread.operation = operation;
  thread.mask = mask;
  thread.source_lane = source_lane;
  thread.sent = sent;
  thread.place = place;
  stop(State::kAtWarp);
  const int first = static_cast<int>(&thread - threads_) / 32 * 32;
  if (thread.meeting != nullptr) meet(first, first + 32, mask);
  return thread.received;
}

// Tells ThreadSanitizer that all who met happen before all who go on. Shuffles and votes do not
// come here: CUDA orders no memory at them.
inline void Scheduler::meet(int first, int last, unsigned mask) {
  uint64_t* meeting = current_->meeting;
  current_->meeting = nullptr;
  if (*meeting == 0) {
    for (int i = first; i < last && i < thread_count_; ++i) {
      if (mask >> (i - first) % 32 & 1) sync_.acquire_arrival(i);
    }
    sync_.release(meeting);
    *meeting = 1;
  } else {
    sync_.acquire(meeting);
  }
}

inline void Scheduler::stop(State state) {
  Thread& thread = *current_;
  thread.state = state;
  sync_.release_arrival(static_cast<int>(&thread - threads_), state == State::kGone);
  thread.fiber->sanitizer.leave_for(home_.sanitizer, /*synchronise=*/false);
  switch_fiber(*thread.fiber, home_);
  thread.fiber->sanitizer.arrive();
}

inline void Scheduler::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  home_.sanitizer.leave_for(thread.fiber->sanitizer, /*synchronise=*/true);
  switch_fiber(home_, *thread.fiber);
  home_.sanitizer.arrive();
}

inline void Scheduler::live_on_fiber() {
  Scheduler& scheduler = of_this_thread();
  scheduler.current_->fiber->sanitizer.arrive();
  for (;;) {
    // An exception cannot leave the fiber: nothing is below it.
    try {
      scheduler.call_(scheduler.body_);
    } catch (const std::exception& error) {
      scheduler.record("%s threw: %s", scheduler.name(*scheduler.current_).text, error.what());
    } catch (...) {
      scheduler.record("%s threw", scheduler.name(*scheduler.current_).text);
    }
    scheduler.stop(State::kGone);
  }
}

inline void Scheduler::make_fibers(int set, int count) {
  for (int& made = fiber_counts_[set]; made < count; ++made) {
    make_fiber(fibers_[set * kMaxThreads + made], live_on_fiber);
  }
}

inline void Scheduler::drop_fibers() {
  for (int set = 0; set < kFiberSets; ++set) {
    for (int i = 0; i < fiber_counts_[set]; ++i) drop_fiber(fibers_[set * kMaxThreads + i]);
    fiber_counts_[set] = 0;
  }
}

inline void* Scheduler::static_shared(const void* key, size_t bytes, size_t alignment) {
  void* memory = shared_.array(key, bytes, alignment);
  if (shared_.over_limit()) {
    record(
        "%zu bytes of static and %zu of dynamic shared memory, expected at most %zu of static "
        "and %zu of both",
        shared_.static_bytes(), shared_.dynamic_bytes(), kMostStaticShared, kMostShared);
  }
  return memory;
}

inline void Scheduler::record(const char* format, ...) {
  if (fault_[0] != '\0') return;
  va_list arguments;
  va_start(arguments, format);
  const int used = snprintf(fault_, sizeof(fault_), "pygen simt: ");
  vsnprintf(fault_ + used, sizeof(fault_) - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  sync_.release_grid();
}

inline Scheduler::Name Scheduler::name(const Thread& thread) const {
  Name name;
  snprintf(name.text, sizeof(name.text), "thread (%u, %u, %u) of block (%u, %u, %u)", thread.index.x, thread.index.y,
           thread.index.z, blockIdx.x, blockIdx.y, blockIdx.z);
  return name;
}

inline void run_grid(void (*call)(void*), void* body, dim3 grid, dim3 block, size_t shared_bytes) {
  check_limits(grid, block, shared_bytes);
  Scheduler::of_this_thread().run_grid(call, body, grid, block, shared_bytes);
}

inline unsigned wait_for_block(Operation operation, bool predicate, Place place) {
  return Scheduler::of_this_thread().wait_for_block(operation, predicate, place);
}

inline uint64_t wait_for_warp(Operation operation, unsigned mask, int source_lane, uint64_t sent, Place place) {
  return Scheduler::of_this_thread().wait_for_warp(operation, mask, source_lane, sent, place);
}

inline void record_bad_width(int width, Place place) { Scheduler::of_this_thread().record_bad_width(width, place); }

inline int lane_index() { return Scheduler::of_this_thread().lane(); }

inline void* static_shared(const void* key, size_t bytes, size_t alignment) {
  return Scheduler::of_this_thread().static_shared(key, bytes, alignment);
}

inline void* dynamic_shared_memory() { return Scheduler::of_this_thread().dynamic_shared(); }

}  // namespace pygen::simt
