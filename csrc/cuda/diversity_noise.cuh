// diversity on CUDA: what is computed from the noises alone, and the gradient to them.
//
// With sqeuclidean noises w has rank nz + 2: center z, divide by sqrt(nz), a_i = |z_i|^2, then w_ij = a_i +
// a_j - 2 z_i.z_j. NoiseTable writes one row [1, a_i, z_i0, z_i1, ..., 0] per noise, padded to whole groups
// of four columns (one 16-byte load). w_ij = sum_c left(c)_i table_jc with left = [a_i, 1, -2 z_i0, -2 z_i1,
// ...], read off the same row.
//
// The gradient to the noises, which training never asks for, goes through the B x B matrix of sample
// distances, a panel of rows at a time.
//
// Bounds (calculated, not yet measured on a device): all of these move B nz or B^2 floats and are
// launch-bound below B = 4096, but for Distances, 3 B^2 D operations: 0.15 ms at B = 1024, D = 3072.
#pragma once

#include "simt.cuh"

namespace kegfast::cuda {

using namespace kegfast::simt;

constexpr int kColumns = 4;  // table columns per 16-byte load

KEGFAST_ANYWHERE constexpr int table_columns(int noise_size) {
  return (noise_size + 2 + kColumns - 1) / kColumns * kColumns;
}

// The left factor of a group of four table columns; `first`: the group that holds [1, a].
KEGFAST_DEVICE Float4 left_factor(const Float4& row, bool first) {
  return first ? Float4{row.y, row.x, -2 * row.z, -2 * row.w}
               : Float4{-2 * row.x, -2 * row.y, -2 * row.z, -2 * row.w};
}

KEGFAST_DEVICE float dot(const Float4& a, const Float4& b) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}

// A sample's number; on rows of norm 1 where `inverse` (their inverse norms, cosine) is given.
template <class T>
KEGFAST_DEVICE float sample_at(const T* samples, const double* inverse, int row, int feature, int features) {
  const float x = to_float(samples[int64_t(row) * features + feature]);
  return inverse == nullptr ? x : float(x * inverse[row]);
}

struct NoiseTable {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const float* noises;  // [batch, noise_size]
    float* table;         // [batch, table_columns(noise_size)]
    int batch, noise_size;
  };
  static constexpr int kMeans = 1024;  // at a time, whatever the noises' size
  static constexpr size_t kShared = kMeans * sizeof(float);
  static int blocks(const Params& p) { return (p.batch + kThreads - 1) / kThreads; }

  KEGFAST_DEVICE static void run(const Params& p) {
    float* mean = reinterpret_cast<float*>(shared());
    const int i = block().x * kThreads + thread(), columns = table_columns(p.noise_size);
    float* row = p.table + int64_t(i) * columns;
    const float scale = 1 / sqrtf(float(p.noise_size));
    float square = 0;
    for (int first = 0; first < p.noise_size; first += kMeans) {
      const int count = smaller(kMeans, p.noise_size - first);
      barrier();                                                // the last means are read
      for (int k = warp(); k < count; k += kThreads / kWarp) {  // every block: cheaper than one more launch
        double sum = 0;
        for (int j = lane(); j < p.batch; j += kWarp) sum += p.noises[int64_t(j) * p.noise_size + first + k];
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane() == 0) mean[k] = float(sum / p.batch);
      }
      barrier();
      for (int k = 0; i < p.batch && k < count; ++k) {
        const float z = (p.noises[int64_t(i) * p.noise_size + first + k] - mean[k]) * scale;
        square = fmaf(z, z, square);
        row[2 + first + k] = z;
      }
    }
    if (i >= p.batch) return;
    row[0] = 1;
    row[1] = square;
    for (int c = 2 + p.noise_size; c < columns; ++c) row[c] = 0;
  }
};

// Rows first .. first + count of a matrix over all pairs: a panel, so that no B x B memory is needed.
struct Panel {
  int first, count;
};

// w_ij, the mean square of the noises' difference, or with `root` its norm.
KEGFAST_DEVICE float pair_weight(const float* zi, const float* zj, int noise_size, bool root) {
  float sum = 0;
  for (int k = 0; k < noise_size; ++k) {
    const float d = zi[k] - zj[k];
    sum = fmaf(d, d, sum);
  }
  return root ? sqrtf(sum) : sum / noise_size;
}

// w_ij of a panel, for the kernels that take any weights.
struct PairWeights {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const float* noises;  // [batch, noise_size]
    float* weights;       // [panel, batch]
    int batch, noise_size;
    Panel panel;
    bool root;  // the norm instead of the mean square
  };
  static int64_t blocks(const Params& p) {
    return (int64_t(p.panel.count) * p.batch + kThreads - 1) / kThreads;
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int64_t pair = int64_t(block().x) * kThreads + thread();
    if (pair >= int64_t(p.panel.count) * p.batch) return;
    p.weights[pair] = pair_weight(p.noises + (p.panel.first + pair / p.batch) * p.noise_size,
                                  p.noises + pair % p.batch * p.noise_size, p.noise_size, p.root);
  }
};

enum class Difference { absolute, square };

// Sum over features of |x_i - x_j| or (x_i - x_j)^2, times `scale`, for a panel's pairs; 32 x 32 a block.
template <class T, Difference kDifference>
struct Distances {
  static constexpr int kThreads = 256, kBlocksPerSm = 2, kTile = 32, kStride = kTile + 1, kPairs = 4;
  struct Params {
    const T* samples;       // [batch, features]
    const double* inverse;  // [batch] inverse norms (cosine), else null
    float* distances;       // [panel, batch]
    int batch, features;
    Panel panel;
    float scale;
  };
  // A zero row has the cosine 0 with every other, |0 - unit|^2 is 1 short of that.
  KEGFAST_DEVICE static float zero_row(const Params& p, int row) {
    return p.inverse != nullptr && p.inverse[row] == 0 ? 1 : 0;
  }
  static constexpr size_t kShared = 2 * kTile * kStride * sizeof(float);

  KEGFAST_DEVICE static void load(const Params& p, float* tile, int first_row, int first_feature) {
    for (int i = thread(); i < kTile * kTile; i += kThreads) {
      const int row = first_row + i / kTile, feature = first_feature + i % kTile;
      const bool inside = row < p.batch && feature < p.features;
      tile[i / kTile * kStride + i % kTile] =
          inside ? sample_at(p.samples, p.inverse, row, feature, p.features) : 0;
    }
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    float* xi = reinterpret_cast<float*>(shared());
    float* xj = xi + kTile * kStride;
    const int first_i = p.panel.first + block().y * kTile, first_j = block().x * kTile;
    const int i = thread() / (kTile / kPairs), j = thread() % (kTile / kPairs);
    float total[kPairs] = {};
    for (int feature = 0; feature < p.features; feature += kTile) {
      barrier();
      load(p, xi, first_i, feature);
      load(p, xj, first_j, feature);
      barrier();
      float sum[kPairs] = {};  // per 32 features first: fewer roundings on the long sum
      KEGFAST_UNROLL
      for (int d = 0; d < kTile; ++d) {
        KEGFAST_UNROLL
        for (int q = 0; q < kPairs; ++q) {
          const float delta = xi[i * kStride + d] - xj[(j + q * (kTile / kPairs)) * kStride + d];
          sum[q] += kDifference == Difference::absolute ? fabsf(delta) : delta * delta;
        }
      }
      KEGFAST_UNROLL
      for (int q = 0; q < kPairs; ++q) total[q] += sum[q];
    }
    KEGFAST_UNROLL
    for (int q = 0; q < kPairs; ++q) {
      const int row = first_i + i, column = first_j + j + q * (kTile / kPairs);
      if (row < p.batch && column < p.batch) {
        p.distances[int64_t(row - p.panel.first) * p.batch + column] =
            (total[q] + zero_row(p, row) + zero_row(p, column)) * p.scale;
      }
    }
  }
};

// d exponent / d noises = coefficient * sum_j d_ij dw_ij/dz_i, both orders of a pair counted.
struct NoiseGradient {
  static constexpr int kThreads = 256, kBlocksPerSm = 4;
  struct Params {
    const float* noises;     // [batch, noise_size]
    const float* distances;  // [panel, batch]
    const float* weights;    // [panel, batch], for the norm only, else null
    float* gradient;         // [batch, noise_size]
    int batch, noise_size;
    Panel panel;
    double coefficient;
  };
  static int64_t blocks(const Params& p) {
    return (int64_t(p.panel.count) * p.noise_size + kThreads / kWarp - 1) / (kThreads / kWarp);
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    const int64_t out = int64_t(block().x) * (kThreads / kWarp) + warp();  // a warp per element
    if (out >= int64_t(p.panel.count) * p.noise_size) return;
    const int i = int(out / p.noise_size), k = int(out % p.noise_size);
    const int64_t at = int64_t(p.panel.first) * p.noise_size + out;
    const float zi = p.noises[at];
    double sum = 0;
    for (int j = lane(); j < p.batch; j += kWarp) {
      const int64_t pair = int64_t(i) * p.batch + j;
      float d = p.distances[pair] * (zi - p.noises[int64_t(j) * p.noise_size + k]);
      if (p.weights != nullptr) d = p.weights[pair] == 0 ? 0 : d / p.weights[pair];
      sum += d;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    const double scale = p.weights != nullptr ? 2.0 : 4.0 / p.noise_size;
    if (lane() == 0) p.gradient[at] = float(p.coefficient * scale * sum);
  }
};

// Sums the blocks' shares into the exponent, in a fixed order; where that is not finite, so is every
// gradient.
struct Finish {
  static constexpr int kThreads = 256, kBlocksPerSm = 1;
  struct Params {
    const double* partial;   // [partials]
    double* exponent;        // []
    float* noise_gradient;   // [batch, noise_size], or null
    float* sample_gradient;  // [batch, features], or null
    int partials, batch, noise_size, features;
    double coefficient;
  };
  static constexpr size_t kShared = (kThreads / kWarp + 1) * sizeof(double);

  KEGFAST_DEVICE static void fill(float* gradient, int64_t count) {
    for (int64_t i = thread(); gradient != nullptr && i < count; i += kThreads) gradient[i] = quiet_nan();
  }

  KEGFAST_DEVICE static void run(const Params& p) {
    double* scratch = reinterpret_cast<double*>(shared());
    double sum = 0;
    for (int i = thread(); i < p.partials; i += kThreads) sum += p.partial[i];
    sum = p.coefficient * block_sum<kThreads>(sum, scratch);
    if (thread() == 0) {
      const bool valid = sum - sum == 0;
      scratch[kThreads / kWarp] = valid ? 1 : 0;
      *p.exponent = valid ? sum : double(quiet_nan());
    }
    barrier();
    if (scratch[kThreads / kWarp] == 0) {
      fill(p.noise_gradient, int64_t(p.batch) * p.noise_size);
      fill(p.sample_gradient, int64_t(p.batch) * p.features);
    }
  }
};

}  // namespace kegfast::cuda
