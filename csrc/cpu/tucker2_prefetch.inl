// Memory that tiles prefetch while they compute.
#pragma once

#include "cpu/tucker2_vec.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

// Steps of k between two prefetches: a burst of them would hold up the loads behind it.
constexpr int64_t kPrefetchSteps = 8;
constexpr int64_t kTapPrefetchSteps = 4;  // of several products each

// `count` stretches of `bytes`, `step` bytes apart.
struct PrefetchRange {
  const void* at;
  int64_t bytes, step, count;
};
inline PrefetchRange moved(PrefetchRange range, int64_t bytes) {
  range.at = static_cast<const char*>(range.at) + bytes;
  return range;
}

// Memory that is needed later, prefetched while tiles compute: a few cache lines every kPrefetchSteps of
// each.
class Prefetcher {
 public:
  Prefetcher() = default;
  explicit Prefetcher(Prefetcher* then) : then_(then) {}
  void clear() { count_ = current_ = 0, offset_ = lines_ = 0; }
  void add(const void* at, int64_t run_bytes, int64_t stride_bytes, int64_t runs) {
    if (runs <= 0 || run_bytes <= 0) return;
    blocks_[count_++] = {static_cast<const char*>(at), run_bytes, stride_bytes, runs};
    lines_ += runs * ((run_bytes + 63) / 64);
  }
  void add(const PrefetchRange& range) { add(range.at, range.bytes, range.step, range.count); }
  void spread_over(int64_t steps) { per_step_ = (lines_ + steps - 1) / (steps > 0 ? steps : 1); }
  void step() {
    for (Prefetcher* a = this; a; a = a->then_) a->prefetch_lines();
  }
  // The first of it and what follows it that has lines left; or null: a tile without one runs without a
  // pause.
  Prefetcher* pending() {
    Prefetcher* a = this;
    while (a && a->current_ >= a->count_) a = a->then_;
    return a;
  }

 private:
  KEGFAST_INLINE void prefetch_lines() {
    for (int64_t left = per_step_; left > 0 && current_ < count_;) {
      Block& block = blocks_[current_];
      const char* at = block.at + offset_;
      for (; left > 0 && offset_ < block.run; --left, offset_ += 64, at += 64) __builtin_prefetch(at, 0, 2);
      if (offset_ < block.run) return;
      offset_ = 0;
      block.at += block.stride;
      if (--block.runs == 0) ++current_;
    }
  }

  struct Block {
    const char* at;
    int64_t run, stride, runs;  // `runs` stretches of `run` bytes, `stride` apart
  };
  Block blocks_[6];
  int count_ = 0, current_ = 0;
  int64_t offset_ = 0, lines_ = 0, per_step_ = 0;
  Prefetcher* then_ = nullptr;  // what else each step prefetches
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
