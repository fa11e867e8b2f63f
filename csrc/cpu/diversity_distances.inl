// All distances of the samples, for what no closed form gives: the noises' gradient and the euclidean metric.
//
// Blocks of 4 x 4 rows walk along the features, so that a number that is loaded serves four pairs.
// Log: docs/kernels/log.md.
#pragma once

#include "cpu/diversity_tile.inl"

namespace kegfast::KEGFAST_ISA {

#if defined(__AVX512F__)
constexpr int kSide = 4;  // a block of kSide x kSide pairs: their sums stay in registers
#else
constexpr int kSide = 2;
#endif
constexpr int64_t kShortSum = 64;  // vectors that are summed up in T, the rest in double

template <class T>
inline T lane_sum(Vec<T> v) {
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += v[l];
  return sum;
}

// distances[i, j] of the rows i.. and j.., kSide of each, where i < j.
// `plain`: rows of T that nothing scales.
template <class T, bool squared, bool plain>
inline void distance_block(const DiversityParams& p, int64_t i, int64_t j, T scale, double* distances) {
  const int64_t B = p.batch;
  int64_t ri[kSide], rj[kSide];
  for (int k = 0; k < kSide; ++k) {
    ri[k] = i + k < B ? i + k : B - 1;
    rj[k] = j + k < B ? j + k : B - 1;
  }
  double total[kSide][kSide] = {};
  const auto row = [&](int64_t r, int64_t feature) __attribute__((always_inline)) {
    return load_unaligned(static_cast<const T*>(p.samples) + r * p.row_stride + feature) * scale;
  };
  const auto any_row = [&](int64_t r, int64_t feature)
                           __attribute__((always_inline)) { return load_row<T>(p, r, feature) * scale; };
  const int64_t whole = plain ? p.features / lanes<T> * lanes<T> : 0;
  for (int64_t feature = 0; feature < p.features;) {
    Vec<T> sum[kSide][kSide] = {};
    const auto add = [&](auto load_at) __attribute__((always_inline)) {
      Vec<T> xj[kSide];
#pragma GCC unroll 4
      for (int b = 0; b < kSide; ++b) xj[b] = load_at(rj[b], feature);
#pragma GCC unroll 4
      for (int a = 0; a < kSide; ++a) {
        const Vec<T> xi = load_at(ri[a], feature);
#pragma GCC unroll 4
        for (int b = 0; b < kSide; ++b) {
          const Vec<T> d = xi - xj[b];
          sum[a][b] += squared ? d * d : vabs(d);
        }
      }
    };
    const int64_t end = feature + kShortSum * lanes<T>;
    for (; feature < end && feature < whole; feature += lanes<T>) add(row);
    for (; feature < end && feature < p.features; feature += lanes<T>) add(any_row);
#pragma GCC unroll 4
    for (int a = 0; a < kSide; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kSide; ++b) total[a][b] += lane_sum<T>(sum[a][b]);
  }
  for (int a = 0; a < kSide; ++a)
    for (int b = 0; b < kSide; ++b)
      if (i + a < j + b && j + b < B) distances[(i + a) * B + j + b] = total[a][b];
}

// Every `step`th group of rows from `first` on, against all later rows.
template <class T, bool squared>
inline void distance_rows(const DiversityParams& p, int64_t first, int64_t step, double unit,
                          double* distances) {
  const int64_t B = p.batch, groups = (B + kSide - 1) / kSide;
  const int64_t fit = (int64_t{1} << 19) / (p.features * static_cast<int64_t>(sizeof(T)) * kSide);
  const int64_t kept = fit < 1 ? 1 : fit;  // groups of rows j that stay in the second cache
  const bool plain = !p.row_scale && (sizeof(T) == 8 || p.element == Element::f32);
  const auto distances_of = plain ? distance_block<T, squared, true> : distance_block<T, squared, false>;
  for (int64_t block = 0; block < groups; block += kept)
    for (int64_t i = first; i < groups && i < block + kept; i += step)
      for (int64_t j = i > block ? i : block; j < groups && j < block + kept; ++j)
        distances_of(p, i * kSide, j * kSide, static_cast<T>(1 / unit), distances);
}

// The largest magnitude of rows first..last, NaN where something is not finite.
template <class T>
inline double magnitude(const DiversityParams& p, int64_t first, int64_t last) {
  Vec<T> most{}, poison{};
  for (int64_t i = first; i < last; ++i)
    for (int64_t feature = 0; feature < p.features; feature += lanes<T>) {
      const Vec<T> x = load_row<T>(p, i, feature);
      most = vmax(vmax(x, -x), most);
      poison += x * 0;
    }
  return largest<T>(most) + lane_sum<T>(poison);
}

}  // namespace kegfast::KEGFAST_ISA
