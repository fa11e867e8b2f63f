// diversity on CUDA: a column of samples in order of its values, by a team of warps.
//
// Floats are sorted by the upper bits of their value and the row in one word of 32 (RoughKey), half of what a
// key of (value, row) takes: half the words to exchange, and a comparison is one instruction. Values that
// differ below those bits alone may then lie the wrong way round; neighbors that do are exchanged until none
// are left, and where that takes long, as where all values share those bits, keys of 64 bits are sorted. The
// order is the same whichever way it came about: by value, then by row.
#pragma once

#include "diversity_keys.cuh"

namespace kegfast::cuda {

// One team's working memory.
struct SortScratch {
  Float4* prefix;       // [capacity] inclusive, swizzled; the sort's exchange before that
  Float4* warp_totals;  // [16]
  float* sorted;        // [capacity], NaN past the batch
};

template <class T, class Word, int kWarps>
struct ColumnSort {
  static constexpr int kTeam = Team<kWarps>::kThreads, kCapacity = kTeam * kKeys;
  using KeyOf = Key<Word, T>;

  // Whether any thread of the team says so.
  KEGFAST_DEVICE static bool any_of_team(const SortScratch& s, bool mine, int t) {
    mine = any(mine);
    if constexpr (kWarps > 1) {
      float* flags = reinterpret_cast<float*>(s.warp_totals);
      Team<kWarps>::barrier();  // the last answers are read
      if (lane() == 0) flags[t / kWarp] = mine ? 1 : 0;
      Team<kWarps>::barrier();
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += flags[w];
      mine = sum > 0;
    }
    return mine;
  }

  KEGFAST_DEVICE static bool any_inversion(const SortScratch& s, const float (&x)[kKeys], int t) {
    bool mine = t > 0 && s.sorted[t * kKeys - 1] > x[0];
    KEGFAST_UNROLL
    for (int q = 1; q < kKeys; ++q) mine |= x[q - 1] > x[q];
    return any_of_team(s, mine, t);
  }

  // ---- sorting a column: the thread's eight values and rows, and all values in s.sorted, for the team to
  // read

  KEGFAST_DEVICE static void publish(const SortScratch& s, const float (&x)[kKeys], int t) {
    reinterpret_cast<Float4*>(s.sorted)[2 * t] = {x[0], x[1], x[2], x[3]};
    reinterpret_cast<Float4*>(s.sorted)[2 * t + 1] = {x[4], x[5], x[6], x[7]};
    Team<kWarps>::barrier();
  }

  // Keys of kind K of the column's rows; element 8 t + q of their order is the thread's key q.
  template <class K, class Bits>
  KEGFAST_DEVICE static void sort_keys(int batch, const SortScratch& s, const float* column, int t,
                                       Bits (&key)[kKeys]) {
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      const int at = q * kTeam + t;
      key[q] = at < batch ? K::pack(column[at], at) : K::kLast;
    }
    Sorter<kWarps, Bits>::sort(key, reinterpret_cast<Bits*>(s.prefix), t);
  }

  KEGFAST_DEVICE static void sort_exactly(int batch, const SortScratch& s, const float* column, int t,
                                          float (&x)[kKeys], uint32_t (&row)[kKeys]) {
    Word key[kKeys];
    sort_keys<KeyOf>(batch, s, column, t, key);
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      x[q] = t * kKeys + q < batch ? KeyOf::value(key[q]) : quiet_nan();
      row[q] = uint32_t(KeyOf::row(key[q]));
    }
    publish(s, x, t);
  }

  // Exchanges neighbors that lie the wrong way round, up to kRepairs times each; false where some are left.
  static constexpr int kRepairs = 6;
  KEGFAST_DEVICE static bool repair(int batch, const SortScratch& s, int t, float (&x)[kKeys],
                                    uint32_t (&row)[kKeys]) {
    uint32_t* rows = reinterpret_cast<uint32_t*>(s.prefix);
    Team<kWarps>::barrier();  // the sort's last exchange is read
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) rows[t * kKeys + q] = row[q];
    KEGFAST_ROLLED
    for (int pass = 0; pass < kRepairs; ++pass) {
      KEGFAST_ROLLED
      for (int odd = 1; odd >= 0; --odd) {
        Team<kWarps>::barrier();
        KEGFAST_ROLLED
        for (int at = t * kKeys + odd; at < t * kKeys + kKeys; at += 2) {
          const int next = at + 1;
          if (next >= batch) break;
          const float a = s.sorted[at], b = s.sorted[next];
          const uint32_t row_a = rows[at], row_b = rows[next];
          if (a > b) {  // equal values stay in the order of their rows
            s.sorted[at] = b, s.sorted[next] = a;
            rows[at] = row_b, rows[next] = row_a;
          }
        }
      }
      Team<kWarps>::barrier();
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) x[q] = s.sorted[t * kKeys + q], row[q] = rows[t * kKeys + q];
      if (!any_inversion(s, x, t)) return true;
    }
    return false;
  }

  KEGFAST_DEVICE static void sort(int batch, const SortScratch& s, const float* column, int t,
                                  float (&x)[kKeys], uint32_t (&row)[kKeys]) {
    if constexpr (sizeof(T) == 4) {
      using Rough = RoughKey<kCapacity>;
      uint32_t key[kKeys];
      sort_keys<Rough>(batch, s, column, t, key);
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) {
        row[q] = uint32_t(Rough::row(key[q]));
        x[q] = t * kKeys + q < batch ? column[row[q]] : quiet_nan();
      }
      publish(s, x, t);
      if (!any_inversion(s, x, t) || repair(batch, s, t, x, row)) return;
      Team<kWarps>::barrier();  // the rows are read
    }
    sort_exactly(batch, s, column, t, x, row);
  }
};

}  // namespace kegfast::cuda
