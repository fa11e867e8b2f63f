// The CPU kernels against double arithmetic in loops, without torch: for processors that only an emulator
// has. Built and run by tests/ops/test_kernels.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cpu/half.h"

namespace check {

inline int passed = 0, failed = 0;

inline void that(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::printf("FAILED %s\n", what.c_str());
}

// The largest difference, as a part of the largest number that is wanted (or of 1, if that is less).
inline void close(const std::vector<double>& got, const std::vector<double>& want, double tolerance,
                  const std::string& what, double least_scale = 1) {
  double most = least_scale, error = got.size() == want.size() ? 0 : INFINITY;
  for (const double value : want) most = std::max(most, std::fabs(value));
  for (size_t i = 0; error < INFINITY && i < want.size(); ++i) {
    const double off = std::fabs(got[i] - want[i]);
    error = off >= 0 ? std::max(error, off) : INFINITY;  // also for NaN
  }
  char text[64];
  std::snprintf(text, sizeof text, ": error %.2g, tolerance %.2g", error / most, tolerance);
  that(error <= tolerance * most, what + text);
}

// Numbers in [-1.73, 1.73], of mean 0 and variance 1.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2862933555777941757u + 3037000493u) {}
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (static_cast<double>(state_ >> 40) / (1 << 24) - 0.5) * std::sqrt(12.0);
  }
  std::vector<double> take(int64_t count, double scale = 1) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) value = next() * scale;
    return values;
  }

 private:
  uint64_t state_;
};

// Memory for kernels: it starts at a cache line and ends where it was asked to, as sanitizers then see.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

enum class Kind { float32, bfloat16, float16 };
inline const char* name(Kind kind) {
  return kind == Kind::float32 ? "float32" : kind == Kind::bfloat16 ? "bfloat16" : "float16";
}

// Numbers in the memory of their type, and what they are there.
class Stored {
 public:
  Stored(Kind kind, int64_t count)
      : kind_(kind), count_(count), memory_(count * (kind == Kind::float32 ? 4 : 2)) {}
  Stored(Kind kind, const std::vector<double>& values) : Stored(kind, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) {
      const float value = static_cast<float>(values[i]);
      if (kind == Kind::float32)
        reinterpret_cast<float*>(data())[i] = value;
      else
        reinterpret_cast<uint16_t*>(data())[i] =
            kind == Kind::float16 ? kegfast::float_to_half(value) : truncated(value);
    }
  }
  void* data() const { return memory_.get(); }
  double operator[](int64_t i) const {
    if (kind_ == Kind::float32) return static_cast<const float*>(data())[i];
    const uint16_t bits = static_cast<const uint16_t*>(data())[i];
    return kind_ == Kind::float16 ? kegfast::half_to_float(bits) : kegfast::bf16_to_float(bits);
  }
  std::vector<double> values() const {
    std::vector<double> all(count_);
    for (int64_t i = 0; i < count_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  static uint16_t truncated(float value) {  // what is stored is read back: any rounding will do
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  }

  Kind kind_;
  int64_t count_;
  Memory<char> memory_;
};

void tucker2();
void diversity();
void soft_target();

}  // namespace check
