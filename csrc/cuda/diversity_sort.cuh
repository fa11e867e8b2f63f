// diversity on CUDA, metric l1, sqeuclidean noises: value and gradient of one feature by sorting its column.
//
//   G_i = sum_j w_ij sign(x_i - x_j),  dS/dx_i = 2 G_i,  S = 2 sum_i x_i G_i.
// In sorted order sum_j w_ij sign(.) is left_i . (P[start] + P[end] - P[B]) with P the exclusive prefix sums
// of the noise table's rows and [start, end) the positions that hold the value x_i, so ties count as exactly
// 0. No pair is ever visited.
//
// A block takes 8 features (a 32-byte sector of a float row; with 16 or more, D = 3072 leaves an H200's
// multiprocessors with one or two blocks each and takes a third longer), W warps each, 8 keys of 32 bits a
// thread in registers (diversity_column.cuh): bitonic network in its mirrored form, every comparison upward;
// steps below 8 in registers, below 256 by shuffles, above through shared memory. Then four table columns at
// a time: gather, prefix by scan. Where no two values of the feature are equal, P[start] and P[end] are the
// sums before and after a thread's own row and stay in registers; else P goes to shared memory (swizzled: 8
// threads write 8 different banks) and is read back at start and end.
//
// Counted in sm_90's code (benchmarks/cuda_counts.py) for an H200 (4 instructions a cycle on 132
// multiprocessors at 1.755 GHz; 65 % of that is a guess of what is reached, nothing was measured on a
// device), float32, D = 3072, nz = 10, forward + gradient, no ties:
//   B      warp instructions a feature      all      at 65 %   samples' traffic   goal
//   256    2.6e3: sort 0.7e3                9 us     13 us     1.3 us             20 us
//   1024   13.7e3: sort 5.6e3               45 us    70 us     5 us               90 us
//   4096   80e3: sort 36e3                  0.27 ms  0.41 ms   21 us              0.5 ms
// With keys of 64 bits the same count gave 3.3e3, 17.4e3 and 98e3 (their sort 1.3e3, 9.5e3, 59e3); halving
// the sort was to give 1.25 to 1.45 times, and gives 1.26, 1.27 and 1.23 with what puts short keys right:
// 0.05, 1.0 and 2.1 passes over a normally distributed column. Beside that two small launches.
#pragma once

#include "diversity_column.cuh"
#include "diversity_noise.cuh"

namespace kegfast::cuda {

KEGFAST_DEVICE Float4 operator+(const Float4& a, const Float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
KEGFAST_DEVICE Float4 operator-(const Float4& a, const Float4& b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w};
}
KEGFAST_DEVICE Float4 shuffle_up4(const Float4& v, int distance) {
  return {shuffle_up(v.x, distance), shuffle_up(v.y, distance), shuffle_up(v.z, distance),
          shuffle_up(v.w, distance)};
}

template <class T, class Word, int kWarps>
struct DiversitySort {
  static constexpr int kTeam = Team<kWarps>::kThreads, kCapacity = kTeam * kKeys, kFeatures = 8;
  static constexpr int kTeams = kWarps >= kFeatures ? 1 : kFeatures / kWarps;
  static constexpr int kThreads = kTeams * kTeam;
  static constexpr int kBlocksPerSm = kThreads > 256 ? 1 : 2;
  using KeyOf = Key<Word, T>;
  using Column = ColumnSort<T, Word, kWarps>;
  using Scratch = SortScratch;

  struct Params {
    const T* samples;    // [batch, features]
    const float* table;  // [batch, columns] of NoiseTable
    float* gradient;     // [batch, features], or null
    double* partial;     // [blocks]: S of the block's features
    int batch, features, columns;
    float gradient_scale;
    int block_features;  // a multiple of kTeams: 8, or less where shared memory is short
  };

  static constexpr size_t kTeamBytes =
      size_t(kCapacity) * (sizeof(Float4) + sizeof(float)) + 16 * sizeof(Float4);
  KEGFAST_ANYWHERE static int column_stride(int batch) { return (batch + kWarp - 1) / kWarp * kWarp + 4; }
  static size_t shared_bytes(const Params& p) {
    return size_t(p.block_features) * column_stride(p.batch) * sizeof(float) + kTeams * kTeamBytes;
  }
  static int blocks(const Params& p) { return (p.features + p.block_features - 1) / p.block_features; }

  KEGFAST_DEVICE static int swizzle(int position) { return position ^ (position / kKeys % 8); }

  // Rows of `vectors` times 16 bytes; kVectors: the same where it is known, to divide by a constant, else 0.
  template <int kVectors>
  KEGFAST_DEVICE static void load_rows(const Params& p, float* tile, int stride, int first, int vectors,
                                       bool& all_finite) {
    constexpr int kVector = 16 / sizeof(T);
    if (kVectors > 0) vectors = kVectors;
    for (int i = thread(); i < p.batch * vectors; i += kThreads) {
      const int row = i / vectors, f = i % vectors * kVector;
      const Words4 v = load_global16(p.samples + int64_t(row) * p.features + first + f);
      KEGFAST_UNROLL
      for (int e = 0; e < kVector; ++e) {
        const float x = element<T>(v, e);
        all_finite &= finite(x);
        tile[(f + e) * stride + row] = x;
      }
    }
  }

  KEGFAST_DEVICE static bool load(const Params& p, float* tile, int stride, int first, int count) {
    constexpr int kVector = 16 / sizeof(T);
    bool all_finite = true;
    const bool whole = count == p.block_features && count % kVector == 0 && p.features % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(p.samples) % 16 == 0;
    if (whole && count == kFeatures) {
      load_rows<kFeatures / kVector>(p, tile, stride, first, kFeatures / kVector, all_finite);
    } else if (whole) {
      load_rows<0>(p, tile, stride, first, count / kVector, all_finite);
    } else {
      KEGFAST_ROLLED
      for (int i = thread(); i < p.batch * p.block_features; i += kThreads) {
        const int row = i / p.block_features, f = i % p.block_features;
        // A constant column stands in for a feature past the end: its S and G are exactly 0.
        const float x = f < count ? to_float(p.samples[int64_t(row) * p.features + first + f]) : 0;
        all_finite &= finite(x);
        tile[f * stride + row] = x;
      }
    }
    return all_finite;
  }

  KEGFAST_DEVICE static void store(const Params& p, const float* tile, int stride, int first, int count) {
    constexpr int kVector = 4, kVectors = kFeatures / kVector;
    if (count == kFeatures && p.features % kVector == 0 &&
        reinterpret_cast<uintptr_t>(p.gradient) % 16 == 0) {
      for (int i = thread(); i < p.batch * kVectors; i += kThreads) {
        const int row = i / kVectors, f = i % kVectors * kVector;
        Words4 v;
        KEGFAST_UNROLL
        for (int e = 0; e < kVector; ++e)
          v.w[e] = float_bits(tile[(f + e) * stride + row] * p.gradient_scale);
        store_global16(p.gradient + int64_t(row) * p.features + first + f, v);
      }
      return;
    }
    KEGFAST_ROLLED
    for (int i = thread(); i < p.batch * count; i += kThreads) {
      const int row = i / count, f = i % count;
      p.gradient[int64_t(row) * p.features + first + f] = tile[f * stride + row] * p.gradient_scale;
    }
  }

  // First position in [low, high) whose value is not below x (or, with kAbove, is above x).
  template <bool kAbove>
  KEGFAST_DEVICE static int search(const float* sorted, int low, int high, float x) {
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sorted[middle] < x || (kAbove && sorted[middle] == x)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Whether two of the team's values are equal.
  KEGFAST_DEVICE static bool any_ties(const Scratch& s, const float (&x)[kKeys], int t) {
    bool mine = t > 0 && s.sorted[t * kKeys - 1] == x[0];
    KEGFAST_UNROLL
    for (int q = 1; q < kKeys; ++q) mine |= x[q] == x[q - 1];
    return Column::any_of_team(s, mine, t);
  }

  // [start, end) of the values equal to each of the thread's own, as start | end << 16.
  KEGFAST_DEVICE static void find_ties(const Scratch& s, const float (&x)[kKeys], int t, int batch,
                                       uint32_t (&ties)[kKeys]) {
    static_assert(kCapacity < 1 << 16);
    const int first = t * kKeys, next = first + kKeys;
    int start = first > 0 && s.sorted[first - 1] == x[0] ? search<false>(s.sorted, 0, first, x[0]) : first;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      if (q > 0 && x[q] != x[q - 1]) start = first + q;
      ties[q] = uint32_t(start);
    }
    const float last = x[kKeys - 1];
    int end = next < batch && s.sorted[next] == last ? search<true>(s.sorted, next, batch, last) : next;
    KEGFAST_UNROLL
    for (int q = kKeys - 1; q >= 0; --q) {
      if (q < kKeys - 1 && x[q] != x[q + 1]) end = first + q + 1;
      ties[q] |= uint32_t(end) << 16;
    }
  }

  KEGFAST_DEVICE static Float4 prefix_at(const Scratch& s, int count) {  // of the first `count` positions
    return count == 0 ? Float4{0, 0, 0, 0} : s.prefix[swizzle(count - 1)];
  }

  // Four table columns of the thread's rows, their sum before them, and (without ties) over the team.
  struct Scanned {
    Float4 right[kKeys], before, all;
  };

  KEGFAST_DEVICE static void scan(const Params& p, const Scratch& s, int t, int column,
                                  uint32_t (&row)[kKeys], Scanned& to) {
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) opaque(row[q]);  // 16 addresses fewer to spill
    Float4 total{0, 0, 0, 0};
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      const bool inside = t * kKeys + q < p.batch;
      to.right[q] = inside ? load_float4(p.table + int64_t(row[q]) * p.columns + column) : Float4{0, 0, 0, 0};
      total = total + to.right[q];
    }
    Float4 upto = total;
    KEGFAST_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Float4 below = shuffle_up4(upto, distance);
      if (lane() >= distance) upto = upto + below;
    }
    to.before = shuffle_up4(upto, 1);
    if (lane() == 0) to.before = {0, 0, 0, 0};
    to.all = {shuffle(upto.x, kWarp - 1), shuffle(upto.y, kWarp - 1), shuffle(upto.z, kWarp - 1),
              shuffle(upto.w, kWarp - 1)};
    Team<kWarps>::barrier();  // the last columns' readers are done
    if constexpr (kWarps > 1) {
      if (lane() == kWarp - 1) s.warp_totals[t / kWarp] = upto;
      Team<kWarps>::barrier();
      Float4 below{0, 0, 0, 0};
      to.all = {0, 0, 0, 0};
      for (int w = 0; w < kWarps; ++w) {
        if (w == t / kWarp) below = to.all;
        to.all = to.all + s.warp_totals[w];
      }
      to.before = below + to.before;
    }
  }

  // Adds four table columns' part of G, in sorted order, where no two values are equal: P[start] and P[end]
  // are the sums before and after the thread's own row.
  template <bool kFirst>
  KEGFAST_DEVICE static void add_distinct(const Params& p, const Scratch& s, int t, int column,
                                          uint32_t (&row)[kKeys], float (&g)[kKeys]) {
    Scanned sums;
    scan(p, s, t, column, row, sums);
    Float4 balance = (sums.before - sums.all) + sums.before;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      const Float4& r = sums.right[q];
      const Float4 b = balance + r;
      if constexpr (kFirst) {
        g[q] = fmaf(r.y, b.x, fmaf(r.x, b.y, fmaf(-2, fmaf(r.z, b.z, r.w * b.w), g[q])));
      } else {
        g[q] = fmaf(-2, dot(r, b), g[q]);
      }
      balance = b + r;
    }
  }

  // The same where some are: the prefix sums go to shared memory and are read at both ends of each tie.
  KEGFAST_DEVICE static void add_columns(const Params& p, const Scratch& s, int t, int column,
                                         uint32_t (&row)[kKeys], uint32_t (&ties)[kKeys], float (&g)[kKeys]) {
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) opaque(ties[q]);
    Scanned sums;
    scan(p, s, t, column, row, sums);
    Float4 running = sums.before;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      running = running + sums.right[q];
      s.prefix[swizzle(t * kKeys + q)] = running;
    }
    Team<kWarps>::barrier();
    const Float4 all = prefix_at(s, p.batch);
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      if (t * kKeys + q < p.batch) {
        const Float4 balance = prefix_at(s, ties[q] & 0xffff) + (prefix_at(s, ties[q] >> 16) - all);
        g[q] += dot(left_factor(sums.right[q], column == 0), balance);
      }
    }
  }

  // Replaces a feature's column by G; returns the thread's part of sum_i x_i G_i.
  KEGFAST_DEVICE static double feature(const Params& p, const Scratch& s, float* column, int t) {
    float x[kKeys], g[kKeys] = {};
    uint32_t row[kKeys], ties[kKeys];
    Column::sort(p.batch, s, column, t, x, row);
    const float center = s.sorted[p.batch / 2];  // sum_i G_i = 0, so any shift of x leaves S as it is
    if (any_ties(s, x, t)) {
      find_ties(s, x, t, p.batch, ties);
      KEGFAST_ROLLED
      for (int c = 0; c < p.columns; c += kColumns) add_columns(p, s, t, c, row, ties, g);
    } else {
      add_distinct<true>(p, s, t, 0, row, g);
      KEGFAST_ROLLED
      for (int c = kColumns; c < p.columns; c += kColumns) add_distinct<false>(p, s, t, c, row, g);
    }
    float sum = 0;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      if (t * kKeys + q < p.batch) {
        sum = fmaf(s.sorted[t * kKeys + q] - center, g[q], sum);
        column[row[q]] = g[q];
      }
    }
    return sum;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int stride = column_stride(p.batch), team = Team<kWarps>::index(), t = thread() % kTeam;
    float* tile = reinterpret_cast<float*>(shared());
    char* own = shared() + size_t(p.block_features) * stride * sizeof(float) + team * kTeamBytes;
    const Scratch s{reinterpret_cast<Float4*>(own), reinterpret_cast<Float4*>(own) + kCapacity,
                    reinterpret_cast<float*>(own + (kCapacity + 16) * sizeof(Float4))};
    const int first = block().x * p.block_features, count = smaller(p.block_features, p.features - first);
    const bool all_finite = load(p, tile, stride, first, count);
    barrier();
    double sum = all_finite ? 0 : quiet_nan();
    KEGFAST_ROLLED
    for (int f = team; f < p.block_features; f += kTeams) {
      sum += feature(p, s, tile + f * stride, t);
      Team<kWarps>::barrier();
    }
    barrier();
    sum = block_sum<kThreads>(
        sum, reinterpret_cast<double*>(shared() + size_t(p.block_features) * stride * sizeof(float)));
    if (thread() == 0) p.partial[block().x] = 2 * sum;
    if (p.gradient != nullptr) store(p, tile, stride, first, count);
  }
};

}  // namespace kegfast::cuda
