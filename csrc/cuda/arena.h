// Hands out 256-byte aligned pieces of one buffer; with no buffer it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kegfast::cuda {

class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace kegfast::cuda
