// Runs one block of a CUDA kernel on one CPU thread: every CUDA thread is a fiber.
//
// A fiber runs until it reaches a barrier or a warp collective; then the next one runs. A warp goes as far as
// it can before another starts. Blocks, warps and lanes go upward, downward or at random, so code that lacks
// a barrier reads what is not there yet in some order. Shared memory starts as NaN bits, or as random ones;
// an asynchronous copy poisons its target until it is waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kegfast::emulator {

enum class Order : uint32_t { ascending, descending };  // any other number: random, the number its seed
constexpr size_t kMostShared = 227 * 1024;              // that a block of sm_90 may ask for

struct Position {
  int thread;
  int block[3], grid[3];
  char* shared;
};

// Runs `body` once per thread of every block of the grid. Throws std::runtime_error on a barrier or
// collective that not all threads reach, on a misaligned access, on a grid that CUDA has not, and on what
// `body` throws.
void run_grid(const int (&grid)[3], int threads, size_t shared_bytes, Order order,
              const std::function<void()>& body);

// From inside a kernel.
const Position& here();
void block_barrier();
void part_barrier(int which, int threads);
// All 32 lanes hand in `bytes` (<= 64) and get the 32 inputs of their warp back, 64 bytes apart; the last to
// come calls `combine`.
constexpr int kSlot = 64;
char* warp_exchange(const char* what, const void* in, size_t bytes, void (*combine)(char* slots) = nullptr);
void async_copy16(void* to, const void* from, bool valid);
void async_commit();
void async_wait(int pending);
// Bulk copies come when somebody waits for them, `to` is poisoned until then; stores read when their thread
// waits or ends, and see of shared memory what was there at the last bulk_fence.
void arrival_init(const void* arrival);
void arrival_wait(const void* arrival, int turn);
void bulk_load(const void* arrival, char* to, size_t bytes, std::function<void(char* to)> copy);
void bulk_fence();
void bulk_store(const char* from, std::function<void(const char* from)> copy);
void bulk_store_wait();
void require_aligned(const void* pointer, size_t alignment, const char* what);

void require_shared(size_t bytes, size_t limit);

template <class Kernel>
void launch(const int (&grid)[3], size_t shared_bytes, Order order, const typename Kernel::Params& params,
            size_t shared_limit = kMostShared) {
  require_shared(shared_bytes, shared_limit);
  run_grid(grid, Kernel::kThreads, shared_bytes, order, [&params] { Kernel::run(params); });
}

}  // namespace kegfast::emulator
