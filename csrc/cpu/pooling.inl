// Maxima and averages over windows of pixels.
#pragma once

#include "cpu/integers.inl"
#include "cpu/tucker2_vec.inl"
#include "plan_kernels.h"

namespace kegfast::KEGFAST_ISA {
namespace {

// The maximum of what it has seen, or NaN if that was among it, as in torch: apart, as a maximum of the two
// would forget a NaN or wait for a select.
struct Maximum {
  Floats largest;
  Ints nan;  // all bits of the lanes that saw one
  KEGFAST_INLINE void see(Floats x) {
    largest = vmax(x, largest);
    nan |= x != x;
  }
  KEGFAST_INLINE Floats value() const { return (Floats)((Ints)largest | nan); }
};

// A window along an axis: its places inside the image, and how many it would count with the padding.
struct Places {
  int64_t begin, end, step, counted;
};
inline Places places_of(int64_t place, int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                        int64_t dilation, bool count_padding) {
  const int64_t start = place * stride - padding;
  const int64_t first = start < 0 ? start + ceil_div(-start, dilation) * dilation : start;
  const int64_t end = smaller(start + dilation * (kernel - 1) + 1, size);
  const int64_t padded = smaller(start + kernel, size + padding) - start;
  return {first, end, dilation, count_padding ? padded : end - first};
}
inline Places share_of(int64_t place, int64_t places, int64_t size) {
  const int64_t begin = place * size / places, end = ceil_div((place + 1) * size, places);
  return {begin, end, 1, end - begin};
}

class Pool {
 public:
  Pool(const PoolParams& p, const float* x) : p_(p), x_(x) {}

  void row(int64_t image, int64_t row, float* y) const {
    const bool adaptive = p_.kind == PoolParams::Kind::adaptive;
    const Places down = adaptive ? share_of(row, p_.out_height, p_.height)
                                 : places_of(row, p_.height, p_.kernel_h, p_.stride_h, p_.padding_h,
                                             p_.dilation_h, p_.count_padding);
    const float* const x = x_ + image * p_.height * p_.width * p_.channels;
    for (int64_t i = 0; i < p_.out_width; ++i, y += p_.channels) {
      const Places across = adaptive ? share_of(i, p_.out_width, p_.width)
                                     : places_of(i, p_.width, p_.kernel_w, p_.stride_w, p_.padding_w,
                                                 p_.dilation_w, p_.count_padding);
      const float divisor = static_cast<float>(p_.divisor ? p_.divisor : down.counted * across.counted);
      for (int64_t c = 0; c < p_.channels; c += kLanes) {
        const int n = static_cast<int>(smaller(kLanes, p_.channels - c));
        const Floats pooled = p_.kind == PoolParams::Kind::maximum ? maximum(x + c, down, across, n)
                                                                   : sum(x + c, down, across, n) / divisor;
        store_first(y + c, pooled, n);
      }
    }
  }

 private:
  template <class F>
  KEGFAST_INLINE void each(const float* x, Places down, Places across, int n, const F& f) const {
    for (int64_t r = down.begin; r < down.end; r += down.step)
      for (int64_t i = across.begin; i < across.end; i += across.step)
        f(load_first(x + (r * p_.width + i) * p_.channels, n));
  }
  Floats maximum(const float* x, Places down, Places across, int n) const {
    Maximum best{splat(-__builtin_inff()), Ints{}};
    each(x, down, across, n, [&best](Floats v) { best.see(v); });
    return best.value();
  }
  // Of each row first: a whole image's sum stays exact enough.
  Floats sum(const float* x, Places down, Places across, int n) const {
    Floats total{};
    for (int64_t r = down.begin; r < down.end; r += down.step) {
      Floats row{};
      each(x, {r, r + 1, 1, 1}, across, n, [&row](Floats v) { row += v; });
      total += row;
    }
    return total;
  }

  const PoolParams& p_;
  const float* const x_;
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
