#include "fibers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulator's stack switch is written for x86-64"
#endif

// Saves the callee-saved registers on the running stack, its pointer in *save, and continues on `load`.
extern "C" void kegfast_switch_stack(void** save, void* load);
asm(R"(
.text
.globl kegfast_switch_stack
.type kegfast_switch_stack,@function
kegfast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kegfast_switch_stack,.-kegfast_switch_stack
)");

namespace kegfast::emulator {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Store {
  const char* from;
  std::function<void(const char*)> copy;
};

struct Meeting {  // a barrier or a warp's collective: all `expected` fibers come, then all go
  int expected = 0, arrived = 0;
  uint32_t generation = 0;
  const char* what = nullptr;
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  std::unique_ptr<char[]> stack;
  Position position{};
  const Meeting* waits_for = nullptr;
  uint32_t generation = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open_group;
  std::vector<Store> stores;  // bulk copies to global memory that were not waited for
};

struct Arriving {  // loads to one place of shared memory, one at a time
  Meeting meeting;
  int done = 0;
  std::function<void()> copy;  // of the load that is under way, if any
};

struct Warp {
  Meeting meeting;
  alignas(16) char slots[2][kWarp * kSlot];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting barrier;
  Meeting parts[16];
  std::map<const void*, Arriving> arrivals;
  std::vector<char> fenced;  // shared memory as the copy engine sees it
  const std::function<void()>* body = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  std::string error;
};

thread_local Block* block = nullptr;
thread_local Fiber* running = nullptr;

void to_scheduler(bool for_good) {
  Fiber* self = running;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, block->scheduler_bottom,
                                 block->scheduler_size);
#endif
  (void)for_good;
  kegfast_switch_stack(&self->stack_pointer, block->scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->fake_stack, &block->scheduler_bottom, &block->scheduler_size);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_bottom, &block->scheduler_size);
#endif
  try {
    (*block->body)();
    bulk_store_wait();
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  running->done = true;
  to_scheduler(true);
  std::abort();  // never resumed
}

void resume(Fiber& fiber) {
  running = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  kegfast_switch_stack(&block->scheduler, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
  if (!block->error.empty()) throw std::runtime_error(block->error);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  const auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  auto* sp = reinterpret_cast<uintptr_t*>(top);
  *--sp = 0;                                         // where fiber_main would return to: alignment only
  *--sp = reinterpret_cast<uintptr_t>(&fiber_main);  // popped by `ret`
  for (int i = 0; i < 6; ++i) *--sp = 0;
  fiber.stack_pointer = sp;
  fiber.waits_for = nullptr;
  fiber.done = false;
  fiber.groups.clear();
  fiber.open_group.clear();
  fiber.stores.clear();
}

bool ready(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->generation != fiber.generation);
}

// In which turn blocks, warps and lanes go.
class Turns {
 public:
  explicit Turns(Order order) : order_(order), random_(uint32_t(order)) {}

  bool random() const { return order_ != Order::ascending && order_ != Order::descending; }
  std::vector<int> of(int count) {
    std::vector<int> turns(count);
    std::iota(turns.begin(), turns.end(), 0);
    if (order_ == Order::descending) std::reverse(turns.begin(), turns.end());
    if (random()) std::shuffle(turns.begin(), turns.end(), random_);
    return turns;
  }
  void poison(char* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) bytes[i] = random() ? char(random_()) : char(0xff);
  }

 private:
  Order order_;
  std::mt19937 random_;
};

// Runs a warp until each of its lanes is done or waits for other warps; whether anything ran.
bool run_warp(int warp, Turns& turns) {
  const int threads = int(block->fibers.size()), first = warp * kWarp,
            count = std::min(kWarp, threads - first);
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (int lane : turns.of(count)) {
      Fiber& fiber = block->fibers[first + lane];
      if (!ready(fiber)) continue;
      resume(fiber);
      progress = any = true;
    }
  }
  return any;
}

void run_block(Turns& turns) {
  for (bool progress = true; progress;) {
    progress = false;
    for (int warp : turns.of(int(block->warps.size()))) {
      progress |= run_warp(warp, turns);
      if (progress && turns.random()) break;  // one team may run far ahead of another
    }
  }
  for (const Fiber& fiber : block->fibers) {
    if (!fiber.done) {
      throw std::runtime_error(std::string(fiber.waits_for->what) + ": not all threads come (thread " +
                               std::to_string(fiber.position.thread) + " waits)");
    }
  }
}

void meet(Meeting& meeting, const char* what) {
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) {
    throw std::runtime_error(std::string("diverged: one lane is at ") + meeting.what + ", another at " +
                             what);
  }
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  running->waits_for = &meeting;
  running->generation = meeting.generation;
  to_scheduler(false);
  running->waits_for = nullptr;
}

}  // namespace

void run_grid(const int (&grid)[3], int threads, size_t shared_bytes, Order order,
              const std::function<void()>& body) {
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[1] > 65535 || grid[2] > 65535 || threads > 1024)
    throw std::runtime_error("a grid that CUDA has not");
  Block state;
  state.fibers.resize(threads);
  state.body = &body;
  Turns turns(order);
  for (int at : turns.of(grid[0] * grid[1] * grid[2])) {
    // Exactly as long as asked for, so that a sanitizer sees an access past its end.
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shared_bytes + (shared_bytes == 0)) != 0) throw std::bad_alloc();
    std::unique_ptr<char, decltype(&std::free)> shared(static_cast<char*>(memory), &std::free);
    turns.poison(shared.get(), shared_bytes);
    state.warps.assign((threads + kWarp - 1) / kWarp, Warp());
    for (Warp& warp : state.warps) warp.meeting.expected = kWarp;
    state.barrier = Meeting{threads};
    for (Meeting& part : state.parts) part = Meeting{};
    state.arrivals.clear();
    state.fenced.assign(shared_bytes, char(0xff));
    block = &state;
    for (int t = 0; t < threads; ++t) {
      prepare(state.fibers[t]);
      const int x = at % grid[0], y = at / grid[0] % grid[1], z = at / grid[0] / grid[1];
      state.fibers[t].position = {t, {x, y, z}, {grid[0], grid[1], grid[2]}, shared.get()};
    }
    run_block(turns);
    block = nullptr;
  }
}

const Position& here() {
  return running->position;
}

void block_barrier() {
  meet(block->barrier, "barrier");
}

void part_barrier(int which, int threads) {
  if (which < 1 || which > 15 || threads % kWarp != 0) throw std::runtime_error("no such barrier");
  Meeting& meeting = block->parts[which];
  if (meeting.arrived == 0) meeting.expected = threads;
  if (meeting.expected != threads) throw std::runtime_error("a barrier of two numbers of threads");
  meet(meeting, "part_barrier");
}

char* warp_exchange(const char* what, const void* in, size_t bytes, void (*combine)(char*)) {
  Warp& warp = block->warps[running->position.thread / kWarp];
  // Two sets of slots: a lane may be one collective ahead of the slowest reader, never two.
  char* slots = warp.slots[warp.meeting.generation % 2];
  if (bytes > 0) std::memcpy(slots + running->position.thread % kWarp * kSlot, in, bytes);
  if (combine != nullptr && warp.meeting.arrived == kWarp - 1) combine(slots);
  meet(warp.meeting, what);
  return slots;
}

void async_copy16(void* to, const void* from, bool valid) {
  std::memset(to, 0xff, 16);
  running->open_group.push_back({to, from, valid});
}

void async_commit() {
  running->groups.push_back(std::move(running->open_group));
  running->open_group.clear();
}

void async_wait(int pending) {
  auto& groups = running->groups;
  while (int(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

void arrival_init(const void* arrival) {
  block->arrivals[arrival] = Arriving{};
}

void arrival_wait(const void* arrival, int turn) {
  const auto found = block->arrivals.find(arrival);
  if (found == block->arrivals.end()) throw std::runtime_error("a wait for an arrival without a beginning");
  Arriving& arriving = found->second;
  // The unit knows no more than whether a turn is even.
  while (arriving.done % 2 == turn % 2) {
    if (arriving.copy) {
      std::exchange(arriving.copy, nullptr)();
      ++arriving.done;
      ++arriving.meeting.generation;
      continue;
    }
    arriving.meeting.what = "arrival";
    running->waits_for = &arriving.meeting;
    running->generation = arriving.meeting.generation;
    to_scheduler(false);
    running->waits_for = nullptr;
  }
}

void bulk_load(const void* arrival, char* to, size_t bytes, std::function<void(char*)> copy) {
  const auto found = block->arrivals.find(arrival);
  if (found == block->arrivals.end())
    throw std::runtime_error("a bulk load without a beginning of its arrival");
  if (found->second.copy) throw std::runtime_error("two bulk loads at once on one arrival");
  require_aligned(to, 1024, "bulk load");
  std::memset(to, 0xff, bytes);
  found->second.copy = [to, copy] { copy(to); };
  ++found->second.meeting.generation;  // those who wait look again
}

void bulk_fence() {
  const char* shared = running->position.shared;
  std::copy(shared, shared + block->fenced.size(), block->fenced.begin());
}

void bulk_store(const char* from, std::function<void(const char*)> copy) {
  require_aligned(from, 1024, "bulk store");
  running->stores.push_back({from, std::move(copy)});
}

void bulk_store_wait() {
  for (const Store& store : running->stores)
    store.copy(block->fenced.data() + (store.from - running->position.shared));
  running->stores.clear();
}

void require_shared(size_t bytes, size_t limit) {
  if (bytes > limit) {
    throw std::runtime_error("a block asks for " + std::to_string(bytes) +
                             " bytes of shared memory, of which it has " + std::to_string(limit));
  }
}

void require_aligned(const void* pointer, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    throw std::runtime_error(std::string(what) + ": misaligned");
}

}  // namespace kegfast::emulator
