// Tiles: one vector of features, all rows of the batch. Loading widens, finishing stores the gradient and
// sums the value.
//
// Rows of 4 KB times n lie in the same few sets of the caches, so tiles are read in blocks; the gradient's
// memory is kept between calls, and the next block and the gradient's place are prefetched row by row during
// the scan. Log: docs/kernels/log.md.
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
  if (p.row_unit) x *= splat(static_cast<T>(p.row_unit[row]));
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

// Tiles that are loaded, and their gradients stored, together: rows lie a page or more apart, so that each
// visit to one should move several cache lines. The block takes at most a quarter of a megabyte.
inline int64_t block_tiles(int64_t batch) {
  const int64_t fit = (int64_t{1} << 18) / (batch * kVectorBytes);
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}

// Rows to prefetch: a page apart, no hardware prefetcher follows them.
constexpr int64_t kRowsAhead = 8;

template <class T>
inline void load_block(const DiversityParams& p, int64_t feature, int64_t tiles, T* x) {
  const int size = element_size(p.element);
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t ahead = (i + kRowsAhead) * p.row_stride + feature;
    for (int64_t k = 0; k < tiles; ++k) {
      __builtin_prefetch(static_cast<const char*>(p.samples) + (ahead + k * lanes<T>)*size, 0, 3);
      store(x + (k * p.batch + i) * lanes<T>, load_row<T>(p, i, feature + k * lanes<T>));
    }
  }
}

template <class T>
inline void store_block(const DiversityParams& p, int64_t feature, int64_t tiles, const T* g) {
  for (int64_t i = 0; i < p.batch; ++i)
    for (int64_t k = 0; k < tiles; ++k)
      store_gradient<T>(p, i, feature + k * lanes<T>, load(g + (k * p.batch + i) * lanes<T>));
}

template <class T>
inline Tile<T> examine_tile(int64_t batch, T* x) {
  Tile<T> t{x, load(x), load(x), true, 1.0};
  Vec<T> poison{};  // turns NaN with the first entry that is not finite
  for (int64_t i = 0; i < batch; ++i) {
    const Vec<T> v = load(x + i * lanes<T>);
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
    for (int64_t i = 0; i < batch; ++i) store(x + i * lanes<T>, load(x + i * lanes<T>) * scale);
    t.low *= scale;
    t.high *= scale;
    t.unit = 1.0 / scale;
  }
  return t;
}

// Puts scale * g(row), times p.gradient_scale, in the place of x and returns sum x g; x is taken from the
// middle of its range, which changes nothing as each column of g sums to 0, but the rounding.
template <class T, class Column>
inline double finish_tile(const DiversityParams& p, const Tile<T>& t, double scale, Column g) {
  const Vec<T> middle = t.low + (t.high - t.low) * T(0.5);
  const Vec<T> stored = splat(static_cast<T>(scale * p.gradient_scale));
  double value = 0;
  for (int64_t i = 0; i < p.batch;) {
    Vec<T> sum{};  // short sums in T, the rest in double
    for (const int64_t end = i + 32 < p.batch ? i + 32 : p.batch; i < end; ++i) {
      const Vec<T> gradient = g(i);
      sum += (load(t.x + i * lanes<T>) - middle) * gradient;
      store(t.x + i * lanes<T>, gradient * stored);
    }
    for (int l = 0; l < lanes<T>; ++l) value += sum[l];
  }
  return value * scale * t.unit;
}

// What a tile's kernel asks for while it computes, a row at each call: the samples of the tile that is as far
// on as a block, and the place of its own gradient. A tile apart, no hardware prefetcher finds them.
class Ahead {
 public:
  template <class T>
  static Ahead of(const DiversityParams& p, int64_t feature, int64_t next) {
    Ahead a;
    const int size = element_size(p.element);
    a.x_ = static_cast<const char*>(p.samples) + (next < p.features ? next : feature) * size;
    a.x_step_ = p.row_stride * size;
    a.g_ = p.gradient ? static_cast<const char*>(p.gradient) + feature * sizeof(T) : a.x_;
    a.g_step_ = p.gradient ? p.features * sizeof(T) : a.x_step_;
    return a;
  }

  void row() {
    __builtin_prefetch(x_, 0, 2);
    __builtin_prefetch(g_, 1, 2);
    x_ += x_step_;
    g_ += g_step_;
  }

 private:
  const char *x_, *g_;
  int64_t x_step_, g_step_;
};

// values[tile] = kernel(t, ahead) for every tile, which leaves the gradient in the place of x; NaN where a
// tile holds anything that is not finite. `x` has room for block_tiles() tiles.
template <class T, class Kernel>
inline void each_tile(const DiversityParams& p, int64_t first, int64_t last, T* x, double* values,
                      Kernel kernel) {
  const int64_t block = block_tiles(p.batch);
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t tiles = block < last - begin ? block : last - begin;
    load_block<T>(p, begin * lanes<T>, tiles, x);
    for (int64_t k = 0; k < tiles; ++k) {
      const Tile<T> t = examine_tile<T>(p.batch, x + k * p.batch * lanes<T>);
      const int64_t feature = (begin + k) * lanes<T>;
      const Ahead ahead = Ahead::of<T>(p, feature, feature + block * lanes<T>);
      values[begin + k] = t.finite ? kernel(t, ahead) : __builtin_nan("");
    }
    if (p.gradient) store_block<T>(p, begin * lanes<T>, tiles, x);
  }
}

}  // namespace kegfast::KEGFAST_ISA
