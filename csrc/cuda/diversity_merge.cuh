// diversity on CUDA, metric l1, batches beyond one block's shared memory (4096 rows): the same sums as
// diversity_sort.cuh, through a workspace in device memory, some features at a time.
//
//   SortTiles     rows by 4096: sorted (value, row) keys, one row of the workspace per feature
//   MergeRuns     pairs of sorted runs to runs twice as long, log2(B / 4096) times; 8 outputs a thread by
//                 merge path
//   SumSorted     one block a feature: prefix sums of the noise table in sorted order, G back by row, the
//                 feature's share of S
//   ScaleTransposed   G, feature by feature, to the gradient, row by row
//
// Prediction for an H200, B = 16384, D = 3072, float32 (not yet measured; goal 2.5 ms): SortTiles
// 0.8 ms by its network's instructions (59 thousand a tile, counted as DiversitySort's of 64-bit keys), the
// rest moves about 100 bytes a sample, 1.0 ms, and waits: three loads of a merged key depend on one another.
#pragma once

#include "diversity_sort.cuh"

namespace kegfast::cuda {

template <class T>
struct SortTiles {
  using One = DiversitySort<T, uint64_t, 16>;
  static constexpr int kThreads = One::kThreads, kBlocksPerSm = 1, kTile = One::kCapacity;
  struct Params {
    const T* samples;                   // [batch, features]
    uint64_t* keys;                     // [count, stride]
    int batch, features, first, count;  // features first .. first + count
    int stride;                         // batch rounded up to whole tiles
    int block_features;
  };
  static size_t shared_bytes(const Params& p) {
    return size_t(p.block_features) * One::column_stride(kTile) * sizeof(float) + kTile * sizeof(uint64_t);
  }
  static int blocks_x(const Params& p) { return (p.count + p.block_features - 1) / p.block_features; }
  static int blocks_y(const Params& p) { return p.stride / kTile; }

  KEGFAST_DEVICE static void run(const Params& p) {
    constexpr int kStride = kTile + 4;
    float* tile = reinterpret_cast<float*>(shared());
    uint64_t* exchange =
        reinterpret_cast<uint64_t*>(shared() + size_t(p.block_features) * kStride * sizeof(float));
    const int first_row = block().y * kTile, rows = smaller(kTile, p.batch - first_row), t = thread();
    const int first = block().x * p.block_features, count = smaller(p.block_features, p.count - first);
    const typename One::Params from{p.samples + int64_t(first_row) * p.features,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    rows,
                                    p.features,
                                    0,
                                    0,
                                    p.block_features};
    One::load(from, tile, kStride, p.first + first, count);
    barrier();
    for (int f = 0; f < count; ++f) {
      uint64_t key[kKeys];
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) {
        const int row = q * kThreads + t;
        key[q] = row < rows ? One::KeyOf::pack(tile[f * kStride + row], first_row + row) : One::KeyOf::kLast;
      }
      Sorter<kThreads / kWarp, uint64_t>::sort(key, exchange, t);
      uint64_t* out = p.keys + int64_t(first + f) * p.stride + first_row + t * kKeys;
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) out[q] = key[q];
    }
  }
};

struct MergeRuns {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const uint64_t* from;  // [features, stride], sorted runs of `run` keys
    uint64_t* to;          // [features, stride], runs of 2 `run`
    int stride, run;
  };
  static int blocks_x(const Params& p) { return (p.stride + kThreads * kKeys - 1) / (kThreads * kKeys); }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int at = (block().x * kThreads + thread()) * kKeys;
    if (at >= p.stride) return;
    const uint64_t* row = p.from + int64_t(block().y) * p.stride;
    const int begin = at / (2 * p.run) * (2 * p.run);
    const int middle = smaller(begin + p.run, p.stride), end = smaller(begin + 2 * p.run, p.stride);
    // Of the first `before` outputs, how many come from the left run, which goes first where keys are equal.
    const int before = at - begin;
    int low = larger(0, before - (end - middle)), high = smaller(before, middle - begin);
    while (low < high) {
      const int left = (low + high) / 2;
      if (row[begin + left] <= row[middle + before - left - 1]) {
        low = left + 1;
      } else {
        high = left;
      }
    }
    int i = begin + low, j = middle + before - low;
    KEGFAST_UNROLL
    for (int q = 0; q < kKeys; ++q) {
      const bool left = j >= end || (i < middle && row[i] <= row[j]);
      p.to[int64_t(block().y) * p.stride + at + q] = left ? row[i++] : row[j++];
    }
  }
};

template <class T>
struct SumSorted {
  using KeyOf = Key<uint64_t, T>;
  static constexpr int kThreads = 512, kBlocksPerSm = 1, kWarps = kThreads / kWarp, kChunk = kThreads * kKeys;
  struct Params {
    const uint64_t* keys;  // [count, stride], sorted
    const float* table;    // [batch, columns] of NoiseTable
    Float4* prefix;        // [blocks, stride] inclusive
    float* g;              // [count, batch]
    double* partial;       // [count]
    int batch, count, stride, columns;
  };
  static constexpr size_t kShared = (kWarps + 1) * sizeof(Float4) + kWarps * sizeof(double);

  KEGFAST_DEVICE static float value(const uint64_t* keys, int position) {
    return KeyOf::value(keys[position]);
  }

  template <bool kAbove>
  KEGFAST_DEVICE static int search(const uint64_t* keys, int low, int high, float x) {
    while (low < high) {
      const int middle = (low + high) / 2;
      const float at = value(keys, middle);
      if (at < x || (kAbove && at == x)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Inclusive prefix sums of four table columns over the whole feature, chunk after chunk.
  KEGFAST_DEVICE static void sum(const Params& p, const uint64_t* keys, Float4* prefix, int column) {
    Float4* totals = reinterpret_cast<Float4*>(shared());
    Float4* carried = totals + kWarps;
    Float4 carry{0, 0, 0, 0};
    for (int chunk = 0; chunk < p.batch; chunk += kChunk) {
      const int first = chunk + thread() * kKeys;
      Float4 upto[kKeys], total{0, 0, 0, 0};
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) {
        if (first + q < p.batch) {
          total = total + load_float4(p.table + int64_t(KeyOf::row(keys[first + q])) * p.columns + column);
        }
        upto[q] = total;
      }
      Float4 across = total;
      KEGFAST_UNROLL
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const Float4 below = shuffle_up4(across, distance);
        if (lane() >= distance) across = across + below;
      }
      Float4 before = shuffle_up4(across, 1);
      if (lane() == 0) before = {0, 0, 0, 0};
      if (lane() == kWarp - 1) totals[warp()] = across;
      barrier();
      Float4 base = carry;
      for (int w = 0; w < warp(); ++w) base = base + totals[w];
      base = base + before;
      if (thread() == kThreads - 1) *carried = base + total;
      KEGFAST_UNROLL
      for (int q = 0; q < kKeys; ++q) {
        if (first + q < p.batch) prefix[first + q] = base + upto[q];
      }
      barrier();  // publishes `carried` and, in the end, `prefix`
      carry = *carried;
    }
  }

  // Adds these columns' part of G, by row; returns the thread's part of sum_i x_i G_i after the last.
  KEGFAST_DEVICE static double add(const Params& p, const uint64_t* keys, const Float4* prefix, float* g,
                                   int column) {
    const bool last_columns = column + kColumns >= p.columns;
    const float center = value(keys, p.batch / 2);
    const Float4 none{0, 0, 0, 0}, all = prefix[p.batch - 1];
    double sum = 0;
    for (int i = thread(); i < p.batch; i += kThreads) {
      const float x = value(keys, i);
      const int row = KeyOf::row(keys[i]);
      const int start = i > 0 && value(keys, i - 1) == x ? search<false>(keys, 0, i, x) : i;
      const int end =
          i + 1 < p.batch && value(keys, i + 1) == x ? search<true>(keys, i + 1, p.batch, x) : i + 1;
      const Float4 balance = (start == 0 ? none : prefix[start - 1]) + (prefix[end - 1] - all);
      const Float4 left = left_factor(load_float4(p.table + int64_t(row) * p.columns + column), column == 0);
      const float mine = (column == 0 ? 0 : g[row]) + dot(left, balance);
      g[row] = mine;
      if (last_columns) sum += finite(x) ? double(x - center) * mine : double(quiet_nan());
    }
    return sum;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared() + (kWarps + 1) * sizeof(Float4));
    Float4* prefix = p.prefix + int64_t(block().x) * p.stride;
    for (int f = block().x; f < p.count; f += grid().x) {
      const uint64_t* keys = p.keys + int64_t(f) * p.stride;
      double share = 0;
      for (int column = 0; column < p.columns; column += kColumns) {
        sum(p, keys, prefix, column);
        share += add(p, keys, prefix, p.g + int64_t(f) * p.batch, column);
        barrier();  // `prefix` is read
      }
      share = block_sum<kThreads>(share, scratch);
      if (thread() == 0) p.partial[f] = 2 * share;
    }
  }
};

struct ScaleTransposed {
  static constexpr int kThreads = 256, kBlocksPerSm = 4, kTile = 32, kPitch = kTile + 1;
  struct Params {
    const float* g;   // [count, batch]
    float* gradient;  // [batch, features], columns first .. first + count
    int batch, features, first, count;
    float scale;
  };
  static constexpr size_t kShared = kTile * kPitch * sizeof(float);

  KEGFAST_DEVICE static void run(const Params& p) {
    float* tile = reinterpret_cast<float*>(shared());
    const int first_row = block().x * kTile, first_feature = block().y * kTile;
    for (int f = warp(); f < kTile; f += kThreads / kWarp) {
      const int row = first_row + lane(), feature = first_feature + f;
      tile[f * kPitch + lane()] =
          row < p.batch && feature < p.count ? p.g[int64_t(feature) * p.batch + row] : 0;
    }
    barrier();
    for (int r = warp(); r < kTile; r += kThreads / kWarp) {
      const int row = first_row + r, feature = first_feature + lane();
      if (row < p.batch && feature < p.count) {
        p.gradient[int64_t(row) * p.features + p.first + feature] = tile[lane() * kPitch + r] * p.scale;
      }
    }
  }
};

}  // namespace kegfast::cuda
