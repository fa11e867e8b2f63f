// diversity on CUDA, any weights: G_i = sum_j w_ij g(x_i - x_j) over the tile of pairs, g = sign (absolute)
// or identity (square).
//
// 32 features (lanes) x 32 rows i (8 warps, 4 each in registers) a block; rows j stream through shared memory
// 32 at a time with their weights. Serves small B, where it beats the sort, and weights of full rank
// (noise_metric or metric "euclidean"). Bound (calculated): B^2 D times 4 instructions: 2 us at B = 64, D =
// 3072 on an H200; not yet measured on a device.
#pragma once

#include "diversity_noise.cuh"

namespace kegfast::cuda {

template <class T, Difference kDifference>
struct DiversityPairs {
  static constexpr int kThreads = 256, kBlocksPerSm = 4, kTile = 32, kRows = kTile / (kThreads / kWarp);
  struct Params {
    const T* samples;       // [batch, features]
    const double* inverse;  // [batch] inverse norms (cosine), else null
    const float* weights;   // [panel, batch]
    float* gradient;        // [batch, features], or null
    double* partial;  // [blocks]: sum_ij w_ij |x_i - x_j| or its square, of the block's rows i and features
    int batch, features;
    Panel panel;           // of rows i, of whole tiles but for the last
    float gradient_scale;  // times G
  };
  static constexpr size_t kShared = 2 * kTile * kTile * sizeof(float);
  static int blocks_x(const Params& p) { return (p.features + kTile - 1) / kTile; }
  static int blocks_y(const Params& p) { return (p.panel.count + kTile - 1) / kTile; }

  KEGFAST_DEVICE static float slope(float delta, float weight) {
    if constexpr (kDifference == Difference::square) return weight * delta;
    return delta > 0 ? weight : (delta < 0 ? -weight : 0);
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    float* tile = reinterpret_cast<float*>(shared());  // [j, feature]
    float* weights = tile + kTile * kTile;             // [i, j]
    const int feature = block().x * kTile + lane(),
              first_row = p.panel.first + block().y * kTile + warp() * kRows;
    const bool inside = feature < p.features;
    float x[kRows], g[kRows] = {};
    bool all_finite = true;
    KEGFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + r;
      x[r] = inside && row < p.batch ? sample_at(p.samples, p.inverse, row, feature, p.features) : 0;
      all_finite &= finite(x[r]);
    }
    for (int first_j = 0; first_j < p.batch; first_j += kTile) {
      barrier();
      KEGFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int j = first_j + warp() * kRows + r, i = first_row + r, column = first_j + lane();
        tile[(warp() * kRows + r) * kTile + lane()] =
            inside && j < p.batch ? sample_at(p.samples, p.inverse, j, feature, p.features) : 0;
        weights[(warp() * kRows + r) * kTile + lane()] =
            i < p.batch && column < p.batch ? p.weights[int64_t(i - p.panel.first) * p.batch + column] : 0;
      }
      barrier();
      KEGFAST_UNROLL
      for (int j = 0; j < kTile; ++j) {
        const float xj = tile[j * kTile + lane()];
        KEGFAST_UNROLL
        for (int r = 0; r < kRows; ++r) g[r] += slope(x[r] - xj, weights[(warp() * kRows + r) * kTile + j]);
      }
    }
    const float center = inside ? sample_at(p.samples, p.inverse, 0, feature, p.features)
                                : 0;  // sum_i G_i = 0: any shift will do
    double sum = all_finite ? 0 : quiet_nan();
    KEGFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + r;
      if (!inside || row >= p.batch) continue;
      sum += double(x[r] - center) * g[r];
      if (p.gradient != nullptr) p.gradient[int64_t(row) * p.features + feature] = g[r] * p.gradient_scale;
    }
    barrier();
    sum = block_sum<kThreads>(sum, reinterpret_cast<double*>(shared()));
    if (thread() == 0) p.partial[block().y * grid().x + block().x] = 2 * sum;
  }
};

// metric "euclidean": squared distances become norms d, and quotients = w / d (0 where d is 0) the weights of
// DiversityPairs with squared differences: sum_ij (w / d) d^2 is the value, its gradient at fixed quotients,
// halved, that of sum_ij w d.
struct Reweigh {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const float* weights;  // [panel, batch]
    float* distances;      // [panel, batch] squares in, norms out
    float* quotients;      // [panel, batch]
    int64_t pairs;
  };
  static int64_t blocks(const Params& p) { return (p.pairs + kThreads - 1) / kThreads; }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int64_t pair = int64_t(block().x) * kThreads + thread();
    if (pair >= p.pairs) return;
    const float d = sqrtf(p.distances[pair]);
    p.distances[pair] = d;
    p.quotients[pair] = d == 0 ? 0 : p.weights[pair] / d;
  }
};

}  // namespace kegfast::cuda
