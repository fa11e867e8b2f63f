// diversity on CUDA, metrics sqeuclidean and cosine with sqeuclidean noises: no pairs, by the noise table's
// low rank.
//
// Per feature, x centered over the batch, A = sum a_i, m_k = sum_i z_ik x_i:
//   S = 2 B sum a_i x_i^2 + 2 A sum x_i^2 + 4 sum_k m_k^2    (all terms >= 0: nothing cancels)
//   dS/dx_i = 4 (x_i (B a_i + A) - sum_j a_j x_j + 2 z_i . m)
// A block takes 32 features (lanes); its 8 warps share the rows. Up to some 1700 rows of float32 its samples
// come into shared memory once, by cp.async, and everything is computed from there; beyond, the two later
// readings come from L2.
//
// cosine is half of this on rows of norm 1. A row's norm needs the whole row before any column's moment can
// be summed, and a row's gradient (the normalization's own derivative) the moments of all columns, so three
// kernels read the samples once each, the latter two from L2 up to its 50 MB: RowNorms, DiversityMoments, and
// RowGradients, which takes the gradient from the moments.
//
// A row of zeros costs its block of RowNorms B distances of noises, side by side with the other rows; Finish,
// one block, looks at no norm.
//
// Predictions for an H200 (calculated, not yet measured), forward + gradient, D = 3072, float32: sqeuclidean
// reads and writes the samples once, B = 256 1.3 us, 1024 5.2 us of traffic, 3 launches; cosine B = 1024 5.2
// us of device memory, 25 MB more of L2, 5 launches.
#pragma once

#include "diversity_noise.cuh"

namespace kegfast::cuda {

template <class T>
struct DiversityMoments {
  static constexpr int kThreads = 256, kBlocksPerSm = 3, kWarps = kThreads / kWarp, kGroups = 3;
  struct Params {
    const T* samples;       // [batch, features]
    const double* inverse;  // [batch] inverse norms (cosine), else null
    const float* table;     // [batch, columns] of NoiseTable
    float* gradient;        // [batch, features], or null
    float* moments;         // [columns, features] and A, for RowGradients, or null; the first row holds means
    double* partial;        // [blocks]: S of the block's features
    int batch, features, columns;
    float gradient_scale;
    bool resident;  // whether the block's samples fit in shared memory
  };
  // moments [columns, 32], partial sums of one group of columns [warps, 12 + 2, 32], the doubles of block_sum
  static constexpr int kPartials = kGroups * kColumns + 2;
  static size_t least_shared(int columns) {
    return sizeof(float) * kWarp * (size_t(columns) + 3 + kWarps * kPartials);
  }
  static size_t shared_bytes(const Params& p) {
    return least_shared(p.columns) + (p.resident ? size_t(p.batch) * kWarp * sizeof(T) : 0);
  }
  static int blocks(const Params& p) { return (p.features + kWarp - 1) / kWarp; }

  // The block's samples to shared memory, [batch, 32]; features past the end repeat the last one.
  KEGFAST_DEVICE static void load(const Params& p, T* tile) {
    constexpr int kVector = 16 / sizeof(T), kVectors = kWarp / kVector;
    const int first = block().x * kWarp;
    const bool whole = first + kWarp <= p.features && p.features % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(p.samples) % 16 == 0;
    if (whole) {
      for (int i = thread(); i < p.batch * kVectors; i += kThreads) {
        const int row = i / kVectors, f = i % kVectors * kVector;
        cp_async16(tile + row * kWarp + f, p.samples + int64_t(row) * p.features + first + f, true);
      }
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      for (int i = thread(); i < p.batch * kWarp; i += kThreads) {
        const int feature = smaller(first + i % kWarp, p.features - 1);
        tile[i] = p.samples[int64_t(i / kWarp) * p.features + feature];
      }
    }
    barrier();
  }

  // Sum over the warps, for each lane, of `value`; all threads get it. `scratch`: [warps, 32].
  KEGFAST_DEVICE static float across_warps(float value, float* scratch) {
    scratch[thread()] = value;
    barrier();
    float sum = 0;
    KEGFAST_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kWarp + lane()];
    barrier();
    return sum;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    float* moments = reinterpret_cast<float*>(shared());  // [columns, 32]
    float* scratch = moments + p.columns * kWarp;
    const int feature = smaller(block().x * kWarp + lane(), p.features - 1);
    const bool inside = block().x * kWarp + lane() < p.features;
    T* tile = reinterpret_cast<T*>(scratch + kWarp * (3 + kWarps * kPartials));
    if (p.resident) load(p, tile);
    const auto sample = [&](int i) {
      if (!p.resident) return sample_at(p.samples, p.inverse, i, feature, p.features);
      const float x = to_float(tile[i * kWarp + lane()]);
      return p.inverse == nullptr ? x : float(x * p.inverse[i]);
    };
    const float shift = sample(0);
    float sum = 0;
    bool all_finite = true;
    for (int i = warp(); i < p.batch; i += kWarps) {
      const float x = sample(i);
      all_finite &= finite(x);
      sum += x - shift;
    }
    const float mean = shift + across_warps(sum, scratch) / p.batch;
    float squares = 0, weighted_squares = 0, noise_total = 0;
    for (int first = 0; first < p.columns; first += kGroups * kColumns) {
      Float4 m[kGroups] = {};
      for (int i = warp(); i < p.batch; i += kWarps) {
        const float x = sample(i) - mean;
        KEGFAST_UNROLL
        for (int c = 0; c < kGroups; ++c) {
          if (first + c * kColumns >= p.columns) break;
          const Float4 row = load_float4(p.table + int64_t(i) * p.columns + first + c * kColumns);
          m[c] = {fmaf(row.x, x, m[c].x), fmaf(row.y, x, m[c].y), fmaf(row.z, x, m[c].z),
                  fmaf(row.w, x, m[c].w)};
          if (first + c == 0) {
            squares = fmaf(x, x, squares);
            weighted_squares = fmaf(row.y * x, x, weighted_squares);
            noise_total += row.y;
          }
        }
      }
      KEGFAST_UNROLL
      for (int c = 0; c < kGroups; ++c) {
        if (first + c * kColumns >= p.columns) break;
        const float parts[kColumns] = {m[c].x, m[c].y, m[c].z, m[c].w};
        KEGFAST_UNROLL
        for (int e = 0; e < kColumns; ++e) {
          const float moment = across_warps(parts[e], scratch);
          if (warp() == 0) moments[(first + c * kColumns + e) * kWarp + lane()] = moment;
        }
      }
    }
    noise_total = across_warps(noise_total, scratch);
    squares = across_warps(squares, scratch);
    weighted_squares = across_warps(weighted_squares, scratch);  // its barriers publish `moments` too
    double value = all_finite ? 0 : quiet_nan();
    if (warp() == 0 && inside) {
      double fourth = 0;
      for (int c = 2; c < p.columns; ++c)
        fourth += double(moments[c * kWarp + lane()]) * moments[c * kWarp + lane()];
      value += 2.0 * p.batch * weighted_squares + 2.0 * noise_total * squares + 4 * fourth;
    }
    if (p.gradient != nullptr && inside) {
      const float weighted_sum = moments[kWarp + lane()];
      for (int i = warp(); i < p.batch; i += kWarps) {
        float projected = 0, a = 0;
        for (int c = 0; c < p.columns; c += kColumns) {
          const Float4 row = load_float4(p.table + int64_t(i) * p.columns + c);
          const float* m = moments + c * kWarp + lane();
          if (c == 0) {
            a = row.y;
            projected = fmaf(row.z, m[2 * kWarp], row.w * m[3 * kWarp]);
          } else {
            projected += dot(row, {m[0], m[kWarp], m[2 * kWarp], m[3 * kWarp]});
          }
        }
        const float x = sample(i) - mean;
        const float slope = fmaf(x, p.batch * a + noise_total, 2 * projected - weighted_sum);
        p.gradient[int64_t(i) * p.features + feature] = slope * p.gradient_scale;
      }
    }
    if (p.moments != nullptr && inside) {
      for (int c = warp(); c < p.columns; c += kWarps)
        p.moments[int64_t(c) * p.features + feature] = c == 0 ? mean : moments[c * kWarp + lane()];
      if (block().x == 0 && thread() == 0) p.moments[int64_t(p.columns) * p.features] = noise_total;
    }
    barrier();
    value = block_sum<kThreads>(value, reinterpret_cast<double*>(scratch));
    if (thread() == 0) p.partial[block().x] = value;
  }
};

// 1 / |x_i|, 0 where x_i is 0. A block per row. The distance of a row of zeros to every other is 1, which
// |unit_i - unit_j|^2 falls short of by 1: what is missing, twice its row's sum of weights, is that block's
// share of S.
template <class T>
struct RowNorms {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const T* samples;     // [batch, features]
    const float* noises;  // [batch, noise_size]
    double* inverse;      // [batch]
    double* partial;      // [batch]
    int batch, features, noise_size;
    bool root;  // noise_metric "euclidean"
  };
  static constexpr size_t kShared = (kThreads / kWarp + 1) * sizeof(double);

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared());
    double* whole = scratch + kThreads / kWarp;
    const T* x = p.samples + int64_t(block().x) * p.features;
    double sum = 0;
    for (int d = thread(); d < p.features; d += kThreads) {
      const double v = to_float(x[d]);
      sum += v * v;
    }
    sum = block_sum<kThreads>(sum, scratch);
    if (thread() == 0) *whole = sum;
    barrier();
    sum = *whole;
    double missing = 0;
    if (sum == 0) {  // of the whole block
      const float* zi = p.noises + int64_t(block().x) * p.noise_size;
      for (int j = thread(); j < p.batch; j += kThreads)
        missing += 2 * pair_weight(zi, p.noises + int64_t(j) * p.noise_size, p.noise_size, p.root);
      missing = block_sum<kThreads>(missing, scratch);
    }
    if (thread() == 0) {
      p.inverse[block().x] = sum == 0 ? 0 : 1 / sqrt(sum);
      p.partial[block().x] = missing;
    }
  }
};

// cosine: the gradient to x from the gradient g to u = x / |x|: (g - u (g . u)) / |x|. A block per row; g
// from the moments, or where there are none already in its place.
template <class T>
struct RowGradients {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const T* samples;       // [batch, features]
    const double* inverse;  // [batch]
    const float* table;     // [batch, columns] of NoiseTable
    const float* moments;   // [columns, features] and A of DiversityMoments, or null
    float* gradient;        // [batch, features]
    int batch, features, columns;
    float gradient_scale;
  };
  static constexpr size_t kShared = (kThreads / kWarp + 1) * sizeof(double);

  KEGFAST_DEVICE static float slope(const Params& p, int d, float unit, const float* row, float diagonal) {
    const float* m = p.moments + d;
    float projected = 0;
    for (int c = 2; c < p.columns; ++c) projected = fmaf(row[c], m[int64_t(c) * p.features], projected);
    return fmaf(unit - m[0], diagonal, 2 * projected - m[p.features]) * p.gradient_scale;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared());
    const int i = block().x;
    const double inverse = p.inverse[i];
    const T* x = p.samples + int64_t(i) * p.features;
    float* gradient = p.gradient + int64_t(i) * p.features;
    const float* row = p.table + int64_t(i) * p.columns;
    const float diagonal =
        p.moments == nullptr ? 0 : p.batch * row[1] + p.moments[int64_t(p.columns) * p.features];
    double sum = 0;
    for (int d = thread(); d < p.features; d += kThreads) {
      const float unit = float(to_float(x[d]) * inverse);
      if (p.moments != nullptr) gradient[d] = slope(p, d, unit, row, diagonal);
      sum += double(unit) * gradient[d];
    }
    sum = block_sum<kThreads>(sum, scratch);
    if (thread() == 0) scratch[kThreads / kWarp] = sum;
    barrier();
    const double along = scratch[kThreads / kWarp];
    for (int d = thread(); d < p.features; d += kThreads)
      gradient[d] = float((gradient[d] - to_float(x[d]) * inverse * along) * inverse);
  }
};

}  // namespace kegfast::cuda
