// What the kernels of diversity need to know of the noises: B x nz numbers, prepared in double.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "diversity.h"

namespace kegfast {

enum class NoiseMetric : int64_t { sqeuclidean, euclidean };

// Memory that starts at a cache line, for vectors of any width.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(
            static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  Aligned(Aligned&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Aligned(const Aligned&) = delete;
  ~Aligned() { ::operator delete(data_, std::align_val_t{64}); }
  T* get() const { return data_; }

 private:
  T* data_;
};

// Centered and divided by `unit`, a power of two near the largest entry, so that no square overflows.
struct Noises {
  int64_t batch, width;
  std::vector<double> z;  // [B, nz]
  double unit = 1;
  bool finite = true;

  template <class Load>
  Noises(int64_t batch, int64_t width, Load load) : batch(batch), width(width), z(batch * width) {
    const double share = 1.0 / static_cast<double>(batch);
    std::vector<double> first(width), mean(width);
    for (int64_t k = 0; k < width; ++k) first[k] = load(0, k);
    for (int64_t i = 0; i < batch; ++i)  // from the first row on, so that equal noises are exactly 0
      for (int64_t k = 0; k < width; ++k) mean[k] += (z[i * width + k] = load(i, k) - first[k]) * share;
    uint64_t most = 0;  // the bits of a magnitude rise with it, and are most for what is not finite
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t k = 0; k < width; ++k)
        most = std::max(most, std::bit_cast<uint64_t>(std::fabs(z[i * width + k] -= mean[k])));
    finite = std::isfinite(std::bit_cast<double>(most));
    if (!finite || most == 0) return;
    int exponent;
    std::frexp(std::bit_cast<double>(most), &exponent);
    unit = std::ldexp(1.0, std::max(exponent, -1000));
    const double inverse = 1 / unit;
    for (double& value : z) value *= inverse;
  }

  const double* row(int64_t i) const { return z.data() + i * width; }

  std::vector<double> square_norms() const {
    std::vector<double> a(batch);
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t k = 0; k < width; ++k) a[i] += row(i)[k] * row(i)[k];
    return a;
  }

  // The mean square is the square over nz; the norm is the norm.
  double distance(int64_t i, int64_t j, NoiseMetric metric) const {
    double square = 0;
    for (int64_t k = 0; k < width; ++k) square += (row(i)[k] - row(j)[k]) * (row(i)[k] - row(j)[k]);
    return metric == NoiseMetric::euclidean ? std::sqrt(square) : square / static_cast<double>(width);
  }

  // The value of one unit of distance().
  double distance_unit(NoiseMetric metric) const {
    return metric == NoiseMetric::euclidean ? unit : unit * unit;
  }
};

// Squared distances |z_i - z_j|^2 as the bilinear form v_i^T J v_j.
struct Bilinear {
  int chunks;
  Aligned<float> rows;  // [B, 16 * chunks]
  std::vector<float> half_total, signature;

  static bool fits(const Noises& noises) { return noises.width + 2 <= 8 * 16; }

  static int chunks_for(int64_t nz) {
    int chunks = 1;
    while (16 * chunks < nz + 2) chunks *= 2;
    return chunks;
  }

  explicit Bilinear(const Noises& noises)
      : chunks(chunks_for(noises.width)), rows(noises.batch * 16 * chunks) {
    const int64_t width = 16 * chunks, nz = noises.width;
    const std::vector<double> a = noises.square_norms();
    double total = 0;
    for (double value : a) total += value;
    const double c = total > 0 ? std::sqrt(total / noises.batch) : 1;  // balances the two last columns
    std::vector<double> sums(width);
    signature.assign(width, 0);
    for (int64_t k = 0; k <= nz + 1; ++k) signature[k] = k <= nz ? -1.0f : 1.0f;
    for (int64_t i = 0; i < noises.batch; ++i) {
      float* v = rows.get() + i * width;
      std::fill(v, v + width, 0.0f);
      for (int64_t k = 0; k < nz; ++k) v[k] = static_cast<float>(M_SQRT2 * noises.row(i)[k]);
      v[nz] = static_cast<float>((a[i] / c - c) * M_SQRT1_2);
      v[nz + 1] = static_cast<float>((a[i] / c + c) * M_SQRT1_2);
      for (int64_t k = 0; k < width; ++k) sums[k] += v[k];
    }
    half_total.resize(width);
    for (int64_t k = 0; k < width; ++k) half_total[k] = static_cast<float>(sums[k] / 2);
  }
};

// The closed form's tables in the compute type: (zh, a) in blocks of 16 columns, and B a_i + A.
template <class T>
struct LowRank {
  int blocks, tail;
  Aligned<T> table;  // [blocks, B, 16]
  std::vector<T> diagonal;

  explicit LowRank(const Noises& noises)
      : blocks(static_cast<int>(noises.width / 16 + 1)),
        tail(static_cast<int>(noises.width % 16)),
        table(noises.batch * blocks * 16),
        diagonal(noises.batch) {
    const int64_t B = noises.batch;
    const std::vector<double> a = noises.square_norms();
    double total = 0;
    for (double value : a) total += value;
    std::fill(table.get(), table.get() + blocks * B * 16, T(0));
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t k = 0; k < noises.width; ++k)
        table.get()[(k / 16 * B + i) * 16 + k % 16] = static_cast<T>(noises.row(i)[k]);
      table.get()[((blocks - 1) * B + i) * 16 + tail] = static_cast<T>(a[i]);
      diagonal[i] = static_cast<T>(B * a[i] + total);
    }
  }
};

// Noise distances as the pair kernels want them in float; in fixed point, in units that let no sum over a row
// overflow 32 bits.
struct PairWeights {
  Aligned<float> weights;  // see weight_index()
  std::vector<int32_t> offsets;
  double unit = 1;

  PairWeights(const Noises& noises, NoiseMetric metric, bool fixed)
      : weights(weight_count(noises.batch)), offsets(noises.batch) {
    const int64_t B = noises.batch, rows = (B + 15) / 16 * 16;
    std::vector<float> z(noises.width * rows);
    for (int64_t i = 0; i < B; ++i)
      for (int64_t k = 0; k < noises.width; ++k) z[k * rows + i] = static_cast<float>(noises.row(i)[k]);
    const double most = KEGFAST_SELECT(diversity_weights)(z.data(), B, noises.width,
                                                          metric == NoiseMetric::euclidean, weights.get());
    if (!fixed) return;
    if (most > 0) unit = most * 1.0001 / 0x1p31;  // a margin for the rounding of the sums
    KEGFAST_SELECT(diversity_fix_weights)(weights.get(), B, unit, offsets.data());
  }
};

}  // namespace kegfast
