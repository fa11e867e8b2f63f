// Memory of results that outlives them: fresh pages cost more than what is written to them.
//
// A fresh 4 KB page costs 1.2 us. malloc is no way out: it gives the top of its heap back whenever a larger
// neighbor is freed, so that the time of a call would hang on what had run before it. Log:
// docs/kernels/log.md.
#pragma once

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kegfast {

constexpr int64_t kLeastKept = 1 << 17;  // bytes: below it malloc does as well

// A block of memory; those given back last wait for the next that asks for about as much.
class KeptMemory {
 public:
  static constexpr int64_t kHugePage = 2 << 20;

  void* const data;
  const int64_t bytes;

  static KeptMemory* take(int64_t bytes) {
    {
      Waiting& waiting = all_waiting();
      const std::lock_guard guard(waiting.lock);
      auto best = waiting.blocks.end();  // the smallest that fits
      for (auto at = waiting.blocks.begin(); at != waiting.blocks.end(); ++at)
        if (bytes <= (*at)->bytes && (*at)->bytes <= 2 * bytes &&
            (best == waiting.blocks.end() || (*at)->bytes <= (*best)->bytes))
          best = at;
      if (best != waiting.blocks.end()) {
        KeptMemory* const memory = *best;
        waiting.blocks.erase(best);
        waiting.bytes -= memory->bytes;
        return memory;
      }
    }
    return new KeptMemory(bytes);
  }

  static void give_back(KeptMemory* memory) {
    Waiting& waiting = all_waiting();
    const std::lock_guard guard(waiting.lock);
    waiting.blocks.push_back(memory);
    waiting.bytes += memory->bytes;
    while (waiting.bytes > kMostWaiting) {  // the oldest go
      waiting.bytes -= waiting.blocks.front()->bytes;
      delete waiting.blocks.front();
      waiting.blocks.erase(waiting.blocks.begin());
    }
  }

 private:
  static constexpr int64_t kMostWaiting = 128 << 20;  // bytes, together

  struct Waiting {
    std::mutex lock;
    std::vector<KeptMemory*> blocks;  // oldest first
    int64_t bytes = 0;
  };

  explicit KeptMemory(int64_t size) : data(::operator new(size, alignment(size))), bytes(size) {
#if defined(__linux__)
    // Advice: failure changes nothing.
    if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  ~KeptMemory() { ::operator delete(data, alignment(bytes)); }
  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

  static std::align_val_t alignment(int64_t size) {
    return std::align_val_t(size >= kHugePage ? kHugePage : 4096);
  }

  static Waiting& all_waiting() {
    static Waiting& waiting = *new Waiting;  // never destroyed: tensors may be freed after everything else
    return waiting;
  }
};

}  // namespace kegfast
