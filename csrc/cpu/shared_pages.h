// Memory of packed factors: those of many layers side by side in huge pages.
//
// A factor is read once in a call, and after other work the address of each of its 4 KB pages is looked up in
// memory before its numbers are. Log: docs/kernels/log.md.
#pragma once

#include <cstdint>
#include <mutex>

#include "cpu/kept_memory.h"

namespace kegfast {

class SharedPages {
 public:
  static constexpr int64_t kBytes = KeptMemory::kHugePage;

  // At an address of whole cache lines; for up to kBytes.
  struct Block {
    void* data;
    SharedPages* pages;
  };
  static Block take(int64_t bytes) {
    const int64_t whole = (bytes + 63) / 64 * 64;
    const std::lock_guard guard(lock());
    SharedPages*& pages = current();
    if (pages && pages->used_ + whole > kBytes) {
      if (pages->blocks_ == 0) delete pages;
      pages = nullptr;
    }
    if (!pages) pages = new SharedPages;
    void* const data = static_cast<char*>(pages->memory_->data) + pages->used_;
    pages->used_ += whole;
    ++pages->blocks_;
    return {data, pages};
  }

  static void give_back(SharedPages* pages) {
    const std::lock_guard guard(lock());
    if (--pages->blocks_ > 0) return;
    if (pages == current())
      pages->used_ = 0;
    else
      delete pages;
  }

 private:
  SharedPages() : memory_(KeptMemory::take(kBytes)) {}
  ~SharedPages() { KeptMemory::give_back(memory_); }
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  // Never destroyed: tensors may be freed after everything else.
  static std::mutex& lock() {
    static std::mutex& mutex = *new std::mutex;
    return mutex;
  }
  static SharedPages*& current() {
    static SharedPages* pages = nullptr;
    return pages;
  }

  KeptMemory* const memory_;
  int64_t used_ = 0, blocks_ = 0;  // bytes handed out; blocks that are still in use
};

}  // namespace kegfast
