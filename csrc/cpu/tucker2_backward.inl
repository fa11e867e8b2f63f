// The backward pass of tucker2, a few images at a time:
//
//   dy --mask of ReLU--> g --last^T--> dz2 --core^T--> dz1 --first^T--> dx   (forward, factors transposed)
//   d last += g (x) t2      d core += dz2 (x) t1      d first += dz1 (x) x      d bias += g
//
// dy is read from memory once; dz2, dz1 and masked or widened numbers stay in caches and in memory that the
// thread keeps. Sums of outer products follow each band, over data that it prefetched. Bound by memory: x, t1
// and t2 come for these sums alone, which at 45 GB/s allows 0.33 of the multiply-add peak at rank 2, 0.93
// over all shapes. Versions, what each bought and what did not: docs/kernels/log.md.
#pragma once

#include "cpu/tucker2_forward.inl"
#include "cpu/tucker2_gradients.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

// g where y is above 0 (or NaN), as torch's threshold_backward.
void mask(Tucker2Type type, const void* y, float* grad, int64_t n) {
  constexpr int64_t kBlock = 256;
  float wide[kBlock];
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t count = smaller(kBlock, n - from);
    const float* values = wide;
    if (type == Tucker2Type::float32)
      values = static_cast<const float*>(y) + from;
    else
      to_float(type, static_cast<const uint16_t*>(y) + from, wide, count);
    float* const out = grad + from;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      store_unaligned(out + i, load_unaligned(values + i) <= 0.0f ? Floats{} : load_unaligned(out + i));
    for (; i < count; ++i) out[i] = values[i] <= 0.0f ? 0.0f : out[i];
  }
}

constexpr int64_t type_bytes(Tucker2Type type) {
  return type == Tucker2Type::float32 ? 4 : 2;
}

class Backward {
 public:
  Backward(const Tucker2GradParams& g, float* scratch)
      : g_(g),
        p_(g.forward),
        scratch_(scratch),
        grad_image_(p_.features * p_.out_height * p_.out_width),
        x_image_(p_.channels * p_.height * p_.width),
        t1_image_(padded_height(p_) * padded_width(p_) * p_.rank_in),
        t2_image_(p_.out_height * p_.out_width * p_.rank_out) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += g_.group) images(n, smaller(g_.group, end - n), end);
  }

 private:
  // dz2, dz1 and dx of `count` images, the operator with transposed factors; the sums follow it band by band,
  // while caches hold what they are made of.
  void images(int64_t n, int64_t count, int64_t end) {
    grad_ = gradient(n, count);
    if (g_.first) x_ = floats(p_.type, p_.x, n, count, x_image_, g_.x_at);
    if (g_.last) t2_ = floats(g_.kept, p_.t2, n, count, t2_image_, g_.t2_at);
    if (g_.core) t1_ = floats(g_.kept, p_.t1, n, count, t1_image_, g_.t1_at);
    if (!g_.dx && !g_.core && !g_.first) return sums_of_g(0, count, 0, p_.out_height, nullptr);
    const bool widened = p_.type != Tucker2Type::float32;
    Tucker2Params back = g_.back;
    back.images = in_scratch(grad_) ? count : end - n;
    back.x = grad_;
    float* const dx = widened ? scratch_ + g_.dx_at : static_cast<float*>(g_.dx) + n * x_image_;
    back.y = g_.dx ? dx : nullptr;
    back.prefetch[0] = prefetch(t2_, t2_image_), back.prefetch[1] = prefetch(t1_, t1_image_),
    back.prefetch[2] = prefetch(x_, x_image_);
    const bool together = g_.group > g_.plan.group_images;
    back.prefetch_steps = together ? 0 : sum_steps();
    if (together) back.t1 = scratch_ + g_.dz2_at, back.t2 = scratch_ + g_.dz1_at;
    Forward forward(back, g_.plan, scratch_);
    for (int64_t i = 0; i < count; i += g_.plan.group_images)
      forward.run(i, smaller(g_.plan.group_images, count - i), 0, back.out_height,
                  [&](const Forward::FinishedBand& done) {
                    if (!together) sums(done);
                  });
    if (together)
      sums({{0, count, 0, back.out_height},
            back.t1,
            back.t2,
            nullptr,
            padded_height(back) * padded_width(back) * p_.rank_out,
            0,
            padded_height(back)});
    if (g_.dx && widened)
      from_float(p_.type, dx, static_cast<uint16_t*>(g_.dx) + n * x_image_, count * x_image_);
  }

  bool in_scratch(const float* at) const { return at >= scratch_ && at < scratch_ + g_.scratch_floats; }

  // Widened numbers are in the caches already.
  Tucker2Prefetch prefetch(const float* at, int64_t floats) const {
    const bool far = at && !in_scratch(at);
    return far ? Tucker2Prefetch{reinterpret_cast<const char*>(at), 4 * floats} : Tucker2Prefetch{};
  }

  // About how often the sums of a row of dz1 prefetch.
  int64_t sum_steps() const {
    constexpr int64_t kStep = 16 * kLanes * kPrefetchSteps;  // multiply-adds
    const int64_t outputs = p_.out_height * p_.out_width;
    const int64_t image = (g_.first ? p_.height * p_.width * p_.channels * p_.rank_in : 0) +
                          (g_.core ? outputs * p_.rank_in * p_.rank_out * p_.kernel_h * p_.kernel_w : 0) +
                          (g_.last ? outputs * p_.rank_out * p_.features : 0);
    return image / (p_.height * kStep);
  }

  void sums(const Forward::FinishedBand& done) {
    const Band& band = done.band;
    const bool whole = g_.back.up.on;  // the first band has made all of dz2: each sums a share of it
    const auto share = [&](int64_t row) { return p_.out_height * row / p_.height; };
    const int64_t border = g_.back.padding_h, below = whole ? share(band.row) : done.begin - border,
                  end = whole ? share(band.row + band.rows) : done.end - border,
                  first = clamp(below, 0, p_.out_height), last = clamp(end, first, p_.out_height);
    if (first < last) {
      sums_of_g(band.image, band.count, first, last, done.prefetcher);
      const int64_t t1_row = padded_width(p_) * p_.rank_in, row = padded_width(g_.back) * p_.rank_out;
      const Rows t1{t1_ + band.image * t1_image_ + first * p_.stride_h * t1_row, t1_image_, t1_row};
      const Rows dz2{done.t1 + (border + first - done.begin) * row + g_.back.padding_w * p_.rank_out,
                     done.t1_image, row};
      if (g_.core) core_gradient(p_, t1, dz2, band.count, last - first, done.prefetcher, g_.core);
    }
    if (!g_.first) return;
    const int64_t pixels = band.rows * p_.width;
    const Image x =
        image(x_ + band.image * x_image_, p_.channels_last, p_.channels, p_.height, p_.width, band.row);
    factor_gradient(done.t2, p_.rank_in, pixels * p_.rank_in, x, p_.channels, band.count, pixels,
                    done.prefetcher, g_.first);
  }

  // Rows first <= row < last of g and t2.
  void sums_of_g(int64_t n, int64_t count, int64_t first, int64_t last, Prefetcher* prefetcher) {
    const int64_t pixels = (last - first) * p_.out_width;
    const Image g = image(grad_ + n * grad_image_, g_.grad_channels_last, p_.features, p_.out_height,
                          p_.out_width, first);
    if (g_.bias) bias_gradient(g, p_.features, count, pixels, g_.bias);
    if (g_.last)
      factor_gradient(t2_ + n * t2_image_ + first * p_.out_width * p_.rank_out, p_.rank_out, t2_image_, g,
                      p_.features, count, pixels, prefetcher, g_.last);
  }

  static Image image(const float* data, bool channels_last, int64_t channels, int64_t height, int64_t width,
                     int64_t row) {
    const int64_t plane = height * width, pixel = channels_last ? channels : 1;
    return {data + row * width * pixel, channels_last, channels * plane, channels_last ? 1 : plane, pixel};
  }

  // Saved numbers as floats: where they are, or widened into the scratch.
  const float* floats(Tucker2Type type, const void* from, int64_t n, int64_t count, int64_t image,
                      int64_t at) {
    if (type == Tucker2Type::float32) return static_cast<const float*>(from) + n * image;
    to_float(type, static_cast<const uint16_t*>(from) + n * image, scratch_ + at, count * image);
    return scratch_ + at;
  }

  const float* gradient(int64_t n, int64_t count) {
    const float* const grad = floats(p_.type, g_.grad, n, count, grad_image_, g_.grad_at);
    if (!g_.y) return grad;
    float* const masked = scratch_ + g_.grad_at;
    if (grad != masked) memcpy(masked, grad, static_cast<size_t>(count * grad_image_) * sizeof(float));
    mask(p_.type, static_cast<const char*>(g_.y) + n * grad_image_ * type_bytes(p_.type), masked,
         count * grad_image_);
    return masked;
  }

  const Tucker2GradParams& g_;
  const Tucker2Params& p_;
  float* const scratch_;
  const int64_t grad_image_, x_image_, t1_image_, t2_image_;  // in numbers
  const float *grad_ = nullptr, *x_ = nullptr, *t1_ = nullptr,
              *t2_ = nullptr;  // of the images at hand
};

// The zeros that the phases of an upsampling core read around `size` input pixels.
template <class F>
int64_t border_of(int64_t stride, int64_t size, const F& phase) {
  int64_t border = 0;
  for (int64_t a = 0; a < stride; ++a) {
    const PhaseAxis c = phase(a);
    if (c.taps && c.count) border = larger(border, larger(c.taps - 1 - c.source, c.source + c.count - size));
  }
  return border;
}

// Images at a time: those of a band, or so many that large sums, which caches do not keep, are touched
// seldom.
int64_t images_together(const Tucker2GradParams& g, int64_t threads) {
  constexpr int64_t kLargeSums = 256 << 10, kPixels = 512;  // bytes
  const Tucker2Params& p = g.forward;
  const int64_t core = 4 * p.rank_in * p.rank_out * p.kernel_h * p.kernel_w;
  if (!g.core || core <= kLargeSums || g.plan.band_rows < p.height) return g.plan.group_images;
  return clamp(kPixels / (p.out_height * p.out_width), g.plan.group_images, larger(1, p.images / threads));
}

}  // namespace

void tucker2_gradient_plan(Tucker2GradParams& g, int64_t threads) {
  const Tucker2Params& p = g.forward;
  Tucker2Params& back = g.back;
  back = p;
  back.channels = p.features, back.features = p.channels;
  back.rank_in = p.rank_out, back.rank_out = p.rank_in;
  back.height = p.out_height, back.width = p.out_width;
  back.out_height = p.height, back.out_width = p.width;
  back.stride_h = back.stride_w = 1;
  back.padding_h = (p.kernel_h - 1) * p.dilation_h - p.padding_h;
  back.padding_w = (p.kernel_w - 1) * p.dilation_w - p.padding_w;
  back.up = {p.stride_h * p.stride_w > 1 || back.padding_h < 0 || back.padding_w < 0, p.stride_h, p.stride_w,
             p.padding_h, p.padding_w};
  if (back.up.on) {
    back.padding_h = border_of(p.stride_h, p.out_height, [&](int64_t a) { return phase_h(back, a); });
    back.padding_w = border_of(p.stride_w, p.out_width, [&](int64_t a) { return phase_w(back, a); });
  }
  back.relu = false;
  back.winograd = smaller(p.winograd, 2);  // F(4x4, 3x3) is for forward passes
  back.bias = nullptr;
  back.type = Tucker2Type::float32;
  back.channels_last = g.grad_channels_last;
  const int64_t plane = p.out_height * p.out_width;
  back.x_image = p.features * plane;
  back.x_channel = back.channels_last ? 1 : plane;
  back.x_pixel = back.channels_last ? p.features : 1;
  back.x_row = back.x_pixel * p.out_width;
  back.t1 = back.t2 = nullptr;
  g.plan = tucker2_plan(back, threads);
  g.group = images_together(g, threads);

  int64_t at = round_up(g.plan.scratch_floats, 16);
  auto take = [&](bool needed, int64_t floats) {
    const int64_t here = at;
    at += needed ? round_up(g.group * floats, 16) : 0;
    return here;
  };
  const bool widens = p.type != Tucker2Type::float32, kept_widens = g.kept != Tucker2Type::float32;
  g.grad_at = take(widens || g.y, p.features * plane);
  g.x_at = take(widens && g.first, p.channels * p.height * p.width);
  const bool together = g.group > g.plan.group_images;
  g.dz2_at = take(together, padded_height(back) * padded_width(back) * p.rank_out);
  g.dz1_at = take(together, p.height * p.width * p.rank_in);
  g.dx_at = take(widens && g.dx, p.channels * p.height * p.width);
  g.t1_at = take(kept_widens && g.core, padded_height(p) * padded_width(p) * p.rank_in);
  g.t2_at = take(kept_widens && g.last, plane * p.rank_out);
  g.scratch_floats = at;
}

void tucker2_gradients(const Tucker2GradParams& g, int64_t begin, int64_t end, float* scratch) {
  const FlushDenormals flush;
  Backward(g, scratch).run(begin, end);
  fence_streams();
}

}  // namespace kegfast::KEGFAST_ISA
