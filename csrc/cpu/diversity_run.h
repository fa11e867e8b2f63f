// One evaluation of the diversity on the CPU: choice of kernel, threads over features. Torch-free but for its
// thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "cpu/diversity_noise.h"
#include "diversity.h"

namespace kegfast {

enum class Metric : int64_t { l1, sqeuclidean, euclidean, cosine };

// l1 under squared noise distances sorts from this batch on. Measured (us for 1024 features, noise width 10,
// one Zen 5 core):    B   48   56   64   80   96  128
//   AVX-512  sort          49   59   68  101  112  147
//            pairs         48   59   69  111  144  225
//   AVX2     sort          92  106  116  169  198  251
//            pairs         89  107  133  220  285  462
// and wider noises, AVX-512, sort / pairs: width 20 at B = 96 159 / 162; 50 at 192 638 / 540, at 256 835 /
// 884; 100 at 384 2645 / 2366, at 512 3504 / 5321.
inline int64_t smallest_sorted_batch(int chunks) {
  return 56 * chunks;
}

inline std::atomic<L1Kernel> forced_l1{L1Kernel::automatic};

// Calls work(part, begin, end) for `parts` equal shares of [0, count), one a thread. The partition depends on
// the number of threads alone, so that sums over parts are repeatable.
template <class Work>
void in_parts(int64_t count, int64_t parts, Work work) {
  if (parts == 1) return work(0, 0, count);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      work(part, count * part / parts, count * (part + 1) / parts);
  });
}

// Threads worth waking for `count` items of `size` numbers each.
inline int64_t threads_for(int64_t count, int64_t size) {
  const int64_t worth = std::min(count, 1 + count * size / (1 << 14));
  if (worth == 1) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), worth);
}

inline void* workspace(int64_t bytes) {
  static thread_local std::vector<char> kept;  // a call a training step: the pages stay mapped
  if (static_cast<int64_t>(kept.size()) < bytes + 64) kept.resize(bytes + 64);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);
}

class Diversity {
 public:
  Diversity(const DiversityParams& params, Metric metric, NoiseMetric noise_metric, const Noises& noises)
      : p_(params),
        metric_(metric),
        noise_metric_(noise_metric),
        noises_(noises),
        wide_(p_.element == Element::f64) {
    const int64_t lanes = KEGFAST_SELECT(diversity_lanes)() / (wide_ ? 2 : 1);
    tiles_ = (p_.features + lanes - 1) / lanes;
    p_.gradient_scale = noises_.distance_unit(noise_metric_);
    if (metric_ == Metric::cosine) normalize_rows();
  }

  // S times `scale`, in the units of both metrics but without means; fills its gradient where p.gradient is
  // given.
  double run(double scale) {
    p_.gradient_scale *= scale;
    return dispatch() * scale * noises_.distance_unit(noise_metric_) * value_unit_;
  }

  // d_ij, [B, B] in double, upper triangle.
  std::vector<double> distances() {
    Distances found = scaled_distances();
    const double unit = metric_ == Metric::sqeuclidean ? found.unit * found.unit : found.unit;
    if (unit != 1)
      for (double& value : found.d) value *= unit;
    return std::move(found.d);
  }

 private:
  using Kernel = void (*)(const DiversityParams&, int64_t, int64_t, void*, double*);

  struct Distances {
    std::vector<double> d;  // in units, or their squares
    double unit;            // a power of two: 1 but where squares would leave the range
  };

  Distances scaled_distances() {
    const int64_t B = p_.batch, parts = threads_for(B, p_.features * 16);
    std::vector<double> largest(parts), d(B * B);
    in_parts(B, parts, [&](int64_t part, int64_t first, int64_t last) {
      largest[part] = KEGFAST_SELECT(diversity_magnitude)(p_, first, last);
    });
    double most = 0;
    for (double value : largest) most = std::isnan(most) || value <= most ? most : value;
    if (std::isnan(most)) return {std::vector<double>(B * B, most), 1};
    const double limit = wide_ ? 0x1p400 : 0x1p40;
    const bool extreme = most > limit || most < 1 / limit;
    const double unit = extreme && most > 0 ? power_near(most, wide_ ? 1020 : 120) : 1;
    in_parts(parts, parts, [&](int64_t part, int64_t, int64_t) {
      KEGFAST_SELECT(diversity_distances)(p_, part, parts, metric_ != Metric::l1, unit, d.data());
    });
    for (int64_t i = 0; i < B; ++i)
      for (int64_t j = i + 1; j < B; ++j) {
        double& value = d[i * B + j];
        if (metric_ == Metric::euclidean) value = std::sqrt(value);
        if (metric_ == Metric::cosine) value = value / 2 + cosine_excess(i, j);
      }
    return {std::move(d), unit};
  }

  // The power of two below x, as far as 2^-most and 2^most, which have reciprocals.
  static double power_near(double x, int most) {
    return std::ldexp(1.0, std::clamp(std::ilogb(x), -most, most));
  }

  double over_tiles(Kernel kernel) {
    std::vector<double> values(tiles_);
    in_parts(tiles_, threads_for(tiles_, p_.batch * 16), [&](int64_t, int64_t first, int64_t last) {
      kernel(p_, first, last, workspace(KEGFAST_SELECT(diversity_workspace)(p_.batch)), values.data());
    });
    double sum = 0;
    for (double value : values) sum += value;
    return sum;
  }

  double dispatch() {
    const bool squared = noise_metric_ == NoiseMetric::sqeuclidean;
    if (metric_ == Metric::l1) {
      if (wide_) return with_weights<double>(KEGFAST_SELECT(diversity_l1_pairs));
      if (squared && Bilinear::fits(noises_)) {
        const int chunks = Bilinear::chunks_for(noises_.width);
        const auto forced = forced_l1.load(std::memory_order_relaxed);
        if (forced == L1Kernel::sort ||
            (forced == L1Kernel::automatic && p_.batch >= smallest_sorted_batch(chunks)))
          return sorted();
      }
      return l1_pairs();
    }
    if (metric_ == Metric::euclidean) return euclidean();
    if (metric_ == Metric::cosine) return cosine(squared);
    return squares(squared);
  }

  double squares(bool squared) {
    if (squared) return wide_ ? low_rank<double>() : low_rank<float>();
    p_.gradient_scale *=
        2;  // of w |x_i - x_j|^2 it is twice that of c |x_i - x_j|^2 with a distance in c, see euclidean()
    return wide_ ? with_weights<double>(KEGFAST_SELECT(diversity_square_pairs)) : square_pairs();
  }

  double sorted() {
    const Bilinear v(noises_);
    p_.chunks = v.chunks;
    p_.bilinear = v.rows.get();
    p_.half_total = v.half_total.data();
    p_.signature = v.signature.data();
    p_.gradient_scale /= static_cast<double>(noises_.width);
    return over_tiles(KEGFAST_SELECT(diversity_l1_sort)) / static_cast<double>(noises_.width);
  }

  template <class T>
  double low_rank() {
    const LowRank<T> tables(noises_);
    p_.low_rank = tables.table.get();
    p_.diagonal = tables.diagonal.data();
    p_.low_rank_blocks = tables.blocks;
    p_.low_rank_tail = tables.tail;
    p_.gradient_scale /= static_cast<double>(noises_.width);
    return over_tiles(KEGFAST_SELECT(diversity_low_rank)) / static_cast<double>(noises_.width);
  }

  double l1_pairs() {
    const PairWeights fixed(noises_, noise_metric_, true);
    p_.weights = fixed.weights.get();
    p_.offsets = fixed.offsets.data();
    p_.weight_unit = fixed.unit;
    return over_tiles(KEGFAST_SELECT(diversity_l1_pairs));
  }

  double square_pairs() {
    const PairWeights weights(noises_, noise_metric_, false);
    p_.weights = weights.weights.get();
    p_.weight_unit = 1;
    return over_tiles(KEGFAST_SELECT(diversity_square_pairs));
  }

  template <class T>
  double with_weights(Kernel kernel) {
    return with_weights<T>(kernel,
                           [&](int64_t i, int64_t j) { return noises_.distance(i, j, noise_metric_); });
  }

  template <class T, class Weight>
  double with_weights(Kernel kernel, Weight weight) {
    const int64_t B = p_.batch;
    Aligned<T> weights(weight_count(B));
    for (int64_t i = 0; i < B; ++i) {
      weights.get()[weight_index(i, i, B)] = 0;
      for (int64_t j = i + 1; j < B; ++j)
        weights.get()[weight_index(i, j, B)] = weights.get()[weight_index(j, i, B)] =
            static_cast<T>(weight(i, j));
    }
    p_.weights = weights.get();
    p_.weight_unit = 1;
    return over_tiles(kernel);
  }

  // sum w d with d = |x_i - x_j|: as sum c |x_i - x_j|^2 with c = w / d, held fixed (d/dx of w d is c (x_i -
  // x_j)). c is in units near 1 / d, and ends where a pair is so much closer than the furthest that its own c
  // would leave the range: its direction then counts for less.
  double euclidean() {
    const Distances scaled = scaled_distances();
    const std::vector<double>& d = scaled.d;
    const double unit = scaled.unit;
    double value = 0, furthest = 0;
    for (int64_t i = 0; i < p_.batch; ++i)
      for (int64_t j = i + 1; j < p_.batch; ++j) {
        value += 2 * d[i * p_.batch + j] * noises_.distance(i, j, noise_metric_);
        furthest = std::max(furthest, d[i * p_.batch + j]);
      }
    value_unit_ = unit;
    if (!p_.gradient || std::isnan(value)) return value;
    const double steepest = wide_ ? 0x1p800 : 0x1p90;
    // Bounded: tiles scale what is tiny up, and the gradient is scaled by 1 / c_unit.
    const double c_unit = std::clamp(power_near(furthest, wide_ ? 1000 : 140) * unit,
                                     wide_ ? 0x1p-900 : 0x1p-100, wide_ ? 0x1p100 : 0x1p20);
    const auto weight = [&](int64_t i, int64_t j) {
      const double distance = d[i * p_.batch + j];
      if (distance == 0) return 0.0;
      return std::min(noises_.distance(i, j, noise_metric_) * (c_unit / unit) / distance, steepest);
    };
    p_.gradient_scale /= c_unit;
    wide_ ? with_weights<double>(KEGFAST_SELECT(diversity_square_pairs), weight)
          : with_weights<float>(KEGFAST_SELECT(diversity_square_pairs), weight);
    return value;
  }

  // 1 - cos = |y_i - y_j|^2 / 2 on rows of norm 1, then the gradient goes back through the normalization.
  double cosine(bool squared) {
    p_.gradient_scale /= 2;
    double value = squares(squared) / 2;
    if (p_.gradient)
      in_parts(p_.batch, threads_for(p_.batch, p_.features), [&](int64_t, int64_t first, int64_t last) {
        KEGFAST_SELECT(diversity_project)(p_, first, last);
      });
    for (int64_t i = 0; i < p_.batch; ++i)
      if (row_scale_[i] == 0)
        for (int64_t j = 0; j < p_.batch; ++j)
          if (i != j)
            value +=
                cosine_excess(i, j) * noises_.distance(i, j, noise_metric_) * (row_scale_[j] == 0 ? 1 : 2);
    return value;
  }

  // A row of norm 0 is at distance 1 of every other; half the squared distance says 1/2 and, for two of them,
  // 0.
  double cosine_excess(int64_t i, int64_t j) const {
    return 0.5 * ((row_scale_[i] == 0) + (row_scale_[j] == 0));
  }

  void normalize_rows() {
    row_scale_.resize(p_.batch);
    in_parts(p_.batch, threads_for(p_.batch, p_.features), [&](int64_t, int64_t first, int64_t last) {
      KEGFAST_SELECT(diversity_square_norms)(p_, first, last, row_scale_.data());
    });
    for (int64_t i = 0; i < p_.batch; ++i) {
      constexpr double kFar = 0x1p200;
      if (row_scale_[i] > 1 / kFar && row_scale_[i] < kFar) continue;
      const double most = KEGFAST_SELECT(diversity_magnitude)(p_, i, i + 1);
      if (!(most > 0) || !std::isfinite(most)) continue;
      if (row_unit_.empty()) row_unit_.assign(p_.batch, 1);
      row_unit_[i] = 1 / power_near(most, wide_ ? 1020 : 120);
    }
    if (!row_unit_.empty()) {
      p_.row_unit = row_unit_.data();
      KEGFAST_SELECT(diversity_square_norms)(p_, 0, p_.batch, row_scale_.data());
    }
    for (double& value : row_scale_) value = value > 0 ? 1 / std::sqrt(value) : value;
    p_.row_scale = row_scale_.data();
  }

  DiversityParams p_;
  Metric metric_;
  NoiseMetric noise_metric_;
  const Noises& noises_;
  bool wide_;
  int64_t tiles_;
  std::vector<double> row_scale_, row_unit_;
  double value_unit_ = 1;  // of what dispatch() returns
};

// d exponent / d noises_i = scale sum_j 2 d_ij dw_ij/dz_i = scale sum_j 2 f_ij (z_i - z_j).
template <class T>
void noise_gradient(const Noises& noises, NoiseMetric metric, const std::vector<double>& d, double scale,
                    T* out) {
  const int64_t B = noises.batch, nz = noises.width;
  const bool root = metric == NoiseMetric::euclidean;
  const double slope = 2.0 / static_cast<double>(nz);  // of the mean square; that of the norm is 1 / w
  std::vector<double> total(B), along(B * nz);
  for (int64_t i = 0; i < B; ++i)
    for (int64_t j = i + 1; j < B; ++j) {
      const double w = root ? noises.distance(i, j, metric) : 0;
      const double f = d[i * B + j] * (!root ? slope : w > 0 ? 1 / w : 0);  // coincident noises: no direction
      total[i] += f;
      total[j] += f;
      for (int64_t k = 0; k < nz; ++k) {
        along[i * nz + k] += f * noises.row(j)[k];
        along[j * nz + k] += f * noises.row(i)[k];
      }
    }
  const double unit = 2 * scale * (root ? 1 : noises.unit);
  for (int64_t i = 0; i < B; ++i)
    for (int64_t k = 0; k < nz; ++k)
      out[i * nz + k] = static_cast<T>(unit * (total[i] * noises.row(i)[k] - along[i * nz + k]));
}

}  // namespace kegfast
