// diversity on CUDA, metrics sqeuclidean and cosine with sqeuclidean noises: no pairs, by the noise table's
// low rank.
//
// Per feature, x centred over the batch, A = sum a_i, m_k = sum_i z_ik x_i:
//   S = 2 B sum a_i x_i^2 + 2 A sum x_i^2 + 4 sum_k m_k^2    (all terms >= 0: nothing cancels)
//   dS/dx_i = 4 (x_i (B a_i + A) - sum_j a_j x_j + 2 z_i . m)
// A block takes 32 features (lanes); its 8 warps share the rows. The samples' tile is read three times, twice
// from L2. cosine is half of this on normalised rows: Normalise before, Project (the normalisation's own
// derivative) after. Bound (calculated): one read and one write of the samples: 5 us at B = 1024, D = 3072 on
// an H200; not yet measured on a device.
#pragma once

#include "diversity_noise.cuh"

namespace kegfast::cuda {

template <class T>
struct DiversityMoments {
  static constexpr int kThreads = 256, kBlocksPerSm = 4, kWarps = kThreads / kWarp, kGroups = 3;
  struct Params {
    const T* samples;    // [batch, features]
    const float* table;  // [batch, columns] of NoiseTable
    float* gradient;     // [batch, features], or null
    double* partial;     // [blocks]: S of the block's features
    int batch, features, columns;
    float gradient_scale;
  };
  // moments [columns, 32], partial sums of one group of columns [warps, 12 + 2, 32], the doubles of block_sum
  static constexpr int kPartials = kGroups * kColumns + 2;
  static size_t shared_bytes(const Params& p) {
    return sizeof(float) * kWarp * (p.columns + 3 + kWarps * kPartials);
  }
  static int blocks(const Params& p) { return (p.features + kWarp - 1) / kWarp; }

  KEGFAST_DEVICE static float sample(const Params& p, int row, int feature) {
    return to_float(p.samples[int64_t(row) * p.features + feature]);
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
    const float shift = sample(p, 0, feature);
    float sum = 0;
    bool all_finite = true;
    for (int i = warp(); i < p.batch; i += kWarps) {
      const float x = sample(p, i, feature);
      all_finite &= finite(x);
      sum += x - shift;
    }
    const float mean = shift + across_warps(sum, scratch) / p.batch;
    float squares = 0, weighted_squares = 0, noise_total = 0;
    for (int first = 0; first < p.columns; first += kGroups * kColumns) {
      Float4 m[kGroups] = {};
      for (int i = warp(); i < p.batch; i += kWarps) {
        const float x = sample(p, i, feature) - mean;
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
        const float x = sample(p, i, feature) - mean;
        const float slope = fmaf(x, p.batch * a + noise_total, 2 * projected - weighted_sum);
        p.gradient[int64_t(i) * p.features + feature] = slope * p.gradient_scale;
      }
    }
    barrier();
    value = block_sum<kThreads>(value, reinterpret_cast<double*>(scratch));
    if (thread() == 0) p.partial[block().x] = value;
  }
};

// unit_i = x_i / |x_i|, 0 where x_i is 0; inverse norms aside. A block per row.
template <class T>
struct Normalise {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const T* samples;  // [batch, features]
    float* unit;       // [batch, features]
    float* inverse;    // [batch]
    int batch, features;
  };
  static constexpr size_t kShared = (kThreads / kWarp + 1) * sizeof(double);

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared());
    const T* x = p.samples + int64_t(block().x) * p.features;
    double sum = 0;
    for (int d = thread(); d < p.features; d += kThreads) {
      const double v = to_float(x[d]);
      sum += v * v;
    }
    sum = block_sum<kThreads>(sum, scratch);
    if (thread() == 0) scratch[kThreads / kWarp] = sum == 0 ? 0 : 1 / sqrt(sum);
    barrier();
    const double inverse = scratch[kThreads / kWarp];
    if (thread() == 0) p.inverse[block().x] = float(inverse);
    for (int d = thread(); d < p.features; d += kThreads) {
      p.unit[int64_t(block().x) * p.features + d] = float(to_float(x[d]) * inverse);
    }
  }
};

// Gradient to x from the gradient to x / |x|, in place: (g - unit (g . unit)) / |x|. A block per row.
struct Project {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const float* unit;     // [batch, features]
    const float* inverse;  // [batch]
    float* gradient;       // [batch, features]
    int batch, features;
  };
  static constexpr size_t kShared = (kThreads / kWarp + 1) * sizeof(double);

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared());
    const int64_t row = int64_t(block().x) * p.features;
    double sum = 0;
    for (int d = thread(); d < p.features; d += kThreads)
      sum += double(p.unit[row + d]) * p.gradient[row + d];
    sum = block_sum<kThreads>(sum, scratch);
    if (thread() == 0) scratch[kThreads / kWarp] = sum;
    barrier();
    const float along = float(scratch[kThreads / kWarp]), inverse = p.inverse[block().x];
    for (int d = thread(); d < p.features; d += kThreads) {
      p.gradient[row + d] = (p.gradient[row + d] - p.unit[row + d] * along) * inverse;
    }
  }
};

}  // namespace kegfast::cuda
