// diversity on CUDA: (value, row) keys and the bitonic network that sorts them, 8 keys a thread.
#pragma once

#include "simt.cuh"

namespace kegfast::cuda {

using namespace kegfast::simt;

// (value, row) in one unsigned word that sorts like the value; equal values by row.
template <class Word, class T>
struct Key {
  static constexpr int kShift = 4 * sizeof(Word);
  static constexpr uint32_t kSign = sizeof(T) == 4 ? 0x80000000u : 0x8000u;
  static constexpr uint32_t kMask = sizeof(T) == 4 ? 0xffffffffu : 0xffffu;
  static constexpr Word kLast = ~Word(0);

  KEGFAST_DEVICE static uint32_t bits(float value) {
    if constexpr (sizeof(T) == 4) {
      return float_bits(value);
    } else {
      return from_float<T>(value).bits;
    }
  }
  KEGFAST_DEVICE static Word pack(float value, int row) {
    const uint32_t b = bits(value + 0.0f);  // -0 equals +0
    return Word(b & kSign ? ~b & kMask : b | kSign) << kShift | Word(row);
  }
  KEGFAST_DEVICE static float value(Word key) {
    const uint32_t b = uint32_t(key >> kShift);
    const uint32_t back = b & kSign ? b & ~kSign : ~b & kMask;
    if constexpr (sizeof(T) == 4) {
      return bits_float(back);
    } else {
      return to_float(T{uint16_t(back)});
    }
  }
  KEGFAST_DEVICE static int row(Word key) { return int(key & ((Word(1) << kShift) - 1)); }
};

// The upper bits of a float and one of kRows rows: sorts like (value, row) but for values that differ below
// those bits.
template <int kRows>
struct RoughKey {
  static_assert((kRows & (kRows - 1)) == 0);
  static constexpr uint32_t kRowMask = kRows - 1, kLast = ~0u;
  KEGFAST_DEVICE static uint32_t pack(float value, int row) {
    return (uint32_t(Key<uint64_t, float>::pack(value, 0) >> 32) & ~kRowMask) | uint32_t(row);
  }
  KEGFAST_DEVICE static int row(uint32_t key) { return int(key & kRowMask); }
};

constexpr int kKeys = 8;  // per thread

// kWarps warps of a block that work on one feature. Another team may go another way (it has ties, say): no
// barrier of a team is the block's.
template <int kWarps>
struct Team {
  static constexpr int kThreads = kWarps * kWarp;
  KEGFAST_DEVICE static int index() { return thread() / kThreads; }
  KEGFAST_DEVICE static void barrier() {
    if constexpr (kWarps == 1) {
      warp_barrier();
    } else {
      part_barrier<kThreads>(1 + index());
    }
  }
};

// Sorts 8 * 32 * kWarps keys; key q of thread t ends as element 8 t + q. `exchange`: as many words of shared
// memory.
template <int kWarps, class Word>
struct Sorter {
  static constexpr int kTeam = Team<kWarps>::kThreads;

  KEGFAST_DEVICE static void order(Word& a, Word& b) {
    const Word low = smaller(a, b);
    b = larger(a, b);
    a = low;
  }

  template <int kSize>
  KEGFAST_DEVICE static void merge_registers(Word (&k)[kKeys]) {  // halving steps kSize / 2, ..., 1
    KEGFAST_UNROLL
    for (int step = kSize / 2; step > 0; step /= 2) {
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) {
        if ((q & step) == 0) order(k[q], k[q | step]);
      }
    }
  }

  template <int kSize>
  KEGFAST_DEVICE static void mirror_registers(Word (&k)[kKeys]) {
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      if ((q & (kSize / 2)) == 0) order(k[q], k[q ^ (kSize - 1)]);
    }
  }

  // Compares with thread t ^ mask, register q or (mirrored) 7 - q; `top`: the bit that tells the lower of the
  // two threads.
  template <bool kMirrored>
  KEGFAST_DEVICE static void across(Word (&k)[kKeys], Word* exchange, int t, int mask, int top) {
    Word other[kKeys];
    if (kWarps == 1 || mask < kWarp) {
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) other[q] = shuffle_xor(k[kMirrored ? kKeys - 1 - q : q], mask);
    } else {
      Team<kWarps>::barrier();
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) exchange[q * kTeam + t] = k[q];
      Team<kWarps>::barrier();
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q)
        other[q] = exchange[(kMirrored ? kKeys - 1 - q : q) * kTeam + (t ^ mask)];
    }
    const bool low = (t & top) == 0;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      if constexpr (sizeof(Word) == 4) {
        k[q] = low ? smaller(k[q], other[q]) : larger(k[q], other[q]);  // one instruction that takes `low`
      } else {
        k[q] = low == (other[q] < k[q]) ? other[q] : k[q];
      }
    }
  }

  KEGFAST_DEVICE static void sort(Word (&k)[kKeys], Word* exchange, int t) {
    mirror_registers<2>(k);
    mirror_registers<4>(k);
    merge_registers<2>(k);
    mirror_registers<8>(k);
    merge_registers<4>(k);
    KEGFAST_ROLLED
    for (int size = 2; size <= kTeam; size *= 2) {  // in threads
      across<true>(k, exchange, t, size - 1, size / 2);
      KEGFAST_ROLLED
      for (int step = size / 4; step > 0; step /= 2) across<false>(k, exchange, t, step, step);
      merge_registers<kKeys>(k);
    }
  }
};

}  // namespace kegfast::cuda
