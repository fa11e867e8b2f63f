// Kernels that only plans run, compiled once per instruction set.
#include <cmath>

#include "cpu/exponential.inl"
#include "cpu/pooling.inl"
#include "plan_kernels.h"

namespace kegfast::KEGFAST_ISA {
namespace {

// f(offset, lanes) for the vectors of so many numbers.
template <class F>
KEGFAST_INLINE void each_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, static_cast<int>(count - i));
}

// NaN stays NaN.
KEGFAST_INLINE Floats clipped(Floats v, float most) {
  const Floats r = relu(v), top = splat(most);
  return r > top ? top : r;
}
KEGFAST_INLINE Floats sigmoid(Floats v) {
  const Floats e = exp_negative(-vabs(v)), s = 1.0f / (1.0f + e);
  const Floats y = v < Floats{} ? e * s : s;
  return v != v ? v : y;
}
KEGFAST_INLINE Floats tanh(Floats v) {
  const Floats a = vabs(v), e = exp_negative(-2.0f * a), far = (1.0f - e) / (1.0f + e);
  const Floats s = v * v;  // near 0 the difference above would cancel: tanh x = x - x^3 / 3 + ...
  const Floats near =
      a * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
  const Floats y = a < 0.25f ? near : far;
  return v != v ? v : v < Floats{} ? -y : y;
}

KEGFAST_INLINE Floats activated(Activation kind, Floats v) {
  switch (kind) {
    case Activation::relu:
      return relu(v);
    case Activation::silu:
      return v * sigmoid(v);
    case Activation::hardswish:
      return v * clipped(v + 3.0f, 6.0f) / 6.0f;
    case Activation::sigmoid:
      return sigmoid(v);
    case Activation::tanh:
      return tanh(v);
    case Activation::hardsigmoid:
      return clipped(v + 3.0f, 6.0f) / 6.0f;
    case Activation::relu6:
      return clipped(v, 6.0f);
  }
  return v;
}

}  // namespace

void pool_rows(const PoolParams& p, const float* x, float* y, int64_t begin, int64_t end) {
  const Pool pool(p, x);
  for (int64_t row = begin; row < end; ++row)
    pool.row(row / p.out_height, row % p.out_height, y + row * p.out_width * p.channels);
}

void place_rows(const PlaceParams& p, const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t row_floats = p.y.width * p.y.channels;
  const int64_t rows = (p.x.height - 1) / p.stride_h + 1, pixels = (p.x.width - 1) / p.stride_w + 1;
  for (int64_t at = begin; at < end; ++at) {
    float* const to = y + at * row_floats;
    const int64_t image = at / p.y.height, row = at % p.y.height - p.top;
    if (rows < p.y.height || pixels < p.y.width || p.x.channels < p.y.channels)
      memset(to, 0, row_floats * sizeof(float));
    if (row < 0 || row >= rows) continue;
    const float* from = x + image * p.strides.image + row * p.stride_h * p.strides.row;
    float* pixel = to + p.left * p.y.channels + p.front;
    for (int64_t i = 0; i < pixels; ++i, from += p.stride_w * p.strides.pixel, pixel += p.y.channels)
      if (p.strides.channel == 1)
        each_vector(p.x.channels,
                    [&](int64_t c, int n) { store_first(pixel + c, load_first(from + c, n), n); });
      else
        for (int64_t c = 0; c < p.x.channels; ++c) pixel[c] = from[c * p.strides.channel];
  }
}

void add_numbers(const float* a, const float* b, float* y, int64_t count, bool rectify) {
  each_vector(count, [=](int64_t i, int n) {
    const Floats sum = load_first(a + i, n) + load_first(b + i, n);
    store_first(y + i, rectify ? relu(sum) : sum, n);
  });
}

void multiply_numbers(const float* a, const float* b, float* y, int64_t count) {
  each_vector(count,
              [=](int64_t i, int n) { store_first(y + i, load_first(a + i, n) * load_first(b + i, n), n); });
}

void activate_numbers(Activation kind, const float* x, float* y, int64_t count) {
  each_vector(count, [=](int64_t i, int n) { store_first(y + i, activated(kind, load_first(x + i, n)), n); });
}

void scale_pixels(const float* x, const float* scale, const float* shift, float* y, int64_t pixels,
                  int64_t channels, bool rectify) {
  for (int64_t i = 0; i < pixels; ++i, x += channels, y += channels)
    each_vector(channels, [=](int64_t c, int n) {
      Floats v = load_first(x + c, n) * load_first(scale + c, n);
      if (shift) v += load_first(shift + c, n);
      store_first(y + c, rectify ? relu(v) : v, n);
    });
}

void softmax_rows(const float* x, float* y, int64_t rows, int64_t channels, bool logarithm) {
  for (int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
    float most = x[0];
    for (int64_t c = 1; c < channels; ++c) most = x[c] > most || x[c] != x[c] ? x[c] : most;
    double sum = 0;
    each_vector(channels, [&](int64_t c, int n) {
      const Floats shifted = load_first(x + c, n) - most, e = exp_negative(shifted);
      const Floats kept = shifted != shifted ? shifted : e;
      store_first(y + c, kept, n);
      for (int i = 0; i < n; ++i) sum += kept[i];
    });
    const float scale = static_cast<float>(1 / sum), offset = most + static_cast<float>(std::log(sum));
    each_vector(channels, [&](int64_t c, int n) {
      const Floats v = logarithm ? load_first(x + c, n) - offset : load_first(y + c, n) * scale;
      store_first(y + c, v, n);
    });
  }
}

}  // namespace kegfast::KEGFAST_ISA
