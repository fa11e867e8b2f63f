// Tiles: one vector of features, all rows of the batch. Loading widens, finishing stores the gradient and
// sums the value.
#pragma once

#include "cpu/vec.h"
#include "diversity.h"

namespace kegfast::KEGFAST_ISA {

template <class T>
inline Vec<T> load_elements(const void* samples, Element element, int64_t offset) {
  if constexpr (sizeof(T) == 8) {
    return load_unaligned(static_cast<const double*>(samples) + offset);
  } else {
    if (element == Element::f32) return load_unaligned(static_cast<const float*>(samples) + offset);
    const uint16_t* narrow = static_cast<const uint16_t*>(samples) + offset;
    return element == Element::bf16 ? load_bf16(narrow) : load_f16(narrow);
  }
}

inline int element_size(Element element) {
  return element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2;
}

// One vector of row `row` from feature `feature` on; lanes past the last feature are 0.
template <class T>
inline Vec<T> load_row(const DiversityParams& p, int64_t row, int64_t feature) {
  const int64_t offset = row * p.row_stride + feature, left = p.features - feature;
  Vec<T> x;
  if (left >= lanes<T>) {
    x = load_elements<T>(p.samples, p.element, offset);
  } else {
    alignas(64) char padded[kVectorBytes] = {};
    const int size = element_size(p.element);
    std::memcpy(padded, static_cast<const char*>(p.samples) + offset * size, left * size);
    x = load_elements<T>(padded, p.element, 0);
  }
  return p.row_scale ? x * splat(static_cast<T>(p.row_scale[row])) : x;
}

template <class T>
inline void store_gradient(const DiversityParams& p, int64_t row, int64_t feature, Vec<T> g) {
  T* out = static_cast<T*>(p.gradient) + row * p.features + feature;
  const int64_t left = p.features - feature;
  if (left >= lanes<T>)
    store_unaligned(out, g);
  else
    std::memcpy(out, &g, left * sizeof(T));
}

// Per-lane facts of a loaded tile.
template <class T>
struct Tile {
  T* x;  // [B, lanes]
  Vec<T> low, high;
  bool finite;
  double unit;  // x was divided by it: 1 but for numbers near the ends of the range
};

template <class T>
inline T largest(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < lanes<T>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Rows lie a page or more apart, which no hardware prefetcher follows: asks for this row of the next tile,
// and for the line that this tile's gradient will take.
template <class T>
inline void prefetch_row(const DiversityParams& p, int64_t row, int64_t feature) {
  const int64_t next = row * p.row_stride + feature + lanes<T>;
  __builtin_prefetch(static_cast<const char*>(p.samples) + next * element_size(p.element), 0, 2);
  if (p.gradient) __builtin_prefetch(static_cast<T*>(p.gradient) + row * p.features + feature, 1, 2);
}

template <class T>
inline Tile<T> load_tile(const DiversityParams& p, int64_t feature, T* x) {
  Tile<T> t{x, load_row<T>(p, 0, feature), {}, true, 1.0};
  t.high = t.low;
  Vec<T> poison{};  // turns NaN with the first entry that is not finite
  for (int64_t i = 0; i < p.batch; ++i) {
    const Vec<T> v = load_row<T>(p, i, feature);
    prefetch_row<T>(p, i, feature);
    store(x + i * lanes<T>, v);
    t.low = vmin(v, t.low);
    t.high = vmax(v, t.high);
    poison += v * 0;
  }
  for (int i = 0; i < lanes<T>; ++i) t.finite &= poison[i] == 0;
  const Vec<T> magnitude = vmax(-t.low, t.high);
  const T most = largest<T>(magnitude);
  constexpr bool narrow = sizeof(T) == 4;
  constexpr T huge = narrow ? T(0x1p40) : T(0x1p400), tiny = 1 / huge;
  if (t.finite && most > 0 && (most > huge || most < tiny)) {
    const T scale = most > huge ? (narrow ? T(0x1p-90) : T(0x1p-700)) : (narrow ? T(0x1p80) : T(0x1p800));
    for (int64_t i = 0; i < p.batch; ++i) store(x + i * lanes<T>, load(x + i * lanes<T>) * scale);
    t.low *= scale;
    t.high *= scale;
    t.unit = 1.0 / scale;
  }
  return t;
}

// Stores scale * g(row) as the gradient (times p.gradient_scale) and returns sum x g; x is taken from the
// middle of its range, which changes nothing as each column of g sums to 0, but the rounding.
template <class T, class Column>
inline double finish_tile(const DiversityParams& p, int64_t feature, const Tile<T>& t, double scale,
                          Column g) {
  const Vec<T> middle = t.low + (t.high - t.low) * T(0.5);
  const Vec<T> stored = splat(static_cast<T>(scale * p.gradient_scale));
  double value = 0;
  for (int64_t i = 0; i < p.batch;) {
    Vec<T> sum{};  // short sums in T, the rest in double
    for (const int64_t end = i + 32 < p.batch ? i + 32 : p.batch; i < end; ++i) {
      const Vec<T> gradient = g(i);
      if (p.gradient) store_gradient<T>(p, i, feature, gradient * stored);
      sum += (load(t.x + i * lanes<T>) - middle) * gradient;
    }
    for (int l = 0; l < lanes<T>; ++l) value += sum[l];
  }
  return value * scale * t.unit;
}

}  // namespace kegfast::KEGFAST_ISA
