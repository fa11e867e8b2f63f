// The backward pass of tucker2, a few images at a time: their gradient is read from memory once, and what the
// stages hand on (dz2, dz1, masked or widened numbers) stays in caches and in memory that the thread keeps.
//
// A training step's profile before, 64@56 at rank 16, batch 8, of 7.9 ms: forward 1.3, dx 1.2, weight gradients
// 2.4, torch's sum of the bias 0.6, the rest page faults of fresh intermediates. Best autograd layout / ours, the
// CIFAR and ResNet layers at C/4, batch 8:
//   image by image, bias and ReLU inside, wide tensors in vectors    1.40
//   the core of a stride by phases instead of torch's backward       64->128@56/2: 8.3 -> 4.3 ms
//   factors packed row by row, sums reduced in blocks                512@7: 0.83 -> 1.08
#pragma once

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
        t2_image_(p_.out_height * p_.out_width * p_.rank_out),
        dz2_image_(padded_height(g.back) * padded_width(g.back) * p_.rank_out),
        dz1_image_(p_.height * p_.width * p_.rank_in) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += g_.group) images(n, smaller(g_.group, end - n), end);
  }

 private:
  void images(int64_t n, int64_t count, int64_t end) {
    const float* const grad = gradient(n, count);
    const int64_t plane = p_.out_height * p_.out_width;
    const bool last = g_.grad_channels_last;
    const Image g{grad, last, grad_image_, last ? 1 : plane, last ? p_.features : 1};
    const float* const x = g_.first ? floats(p_.type, p_.x, n, count, x_image_, g_.x_at) : nullptr;
    if (g_.dx || g_.core || g_.first) backwards(n, count, end, grad);  // which asks for g ahead of time
    if (g_.bias) bias_gradient(g, p_.features, count, plane, g_.bias);
    if (g_.last) {
      const float* const t2 = floats(g_.kept, p_.t2, n, count, t2_image_, g_.t2_at);
      factor_gradient(t2, p_.rank_out, g, p_.features, count, plane, g_.last);
    }
    if (g_.core) {
      const float* const t1 = floats(g_.kept, p_.t1, n, count, t1_image_, g_.t1_at);
      core_gradient(p_, t1, scratch_ + g_.dz2_at, g_.back.padding_h, g_.back.padding_w, count, g_.core);
    }
    if (g_.first) {
      const Image in{x, p_.channels_last, x_image_, p_.channels_last ? 1 : p_.height * p_.width,
                     p_.channels_last ? p_.channels : 1};
      factor_gradient(scratch_ + g_.dz1_at, p_.rank_in, in, p_.channels, count, p_.height * p_.width,
                      g_.first);
    }
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

  // dz2, dz1 and dx of `count` images: the operator with transposed factors.
  void backwards(int64_t n, int64_t count, int64_t end, const float* grad) {
    const bool widened = p_.type != Tucker2Type::float32;
    Tucker2Params back = g_.back;
    back.images = grad >= scratch_ && grad < scratch_ + g_.scratch_floats ? count : end - n;
    back.x = grad;
    back.t1 = g_.core ? scratch_ + g_.dz2_at : nullptr;
    back.t2 = g_.first ? scratch_ + g_.dz1_at : nullptr;
    float* const dx = widened ? scratch_ + g_.dx_at : static_cast<float*>(g_.dx) + n * x_image_;
    back.y = g_.dx ? dx : nullptr;
    if (g_.first && !widened) {
      back.soon = reinterpret_cast<const char*>(static_cast<const float*>(p_.x) + n * x_image_);
      back.soon_bytes = 4 * x_image_;
    }
    Forward forward(back, g_.plan, scratch_);
    for (int64_t i = 0; i < count; i += g_.plan.group_images)
      forward.run(i, smaller(g_.plan.group_images, count - i), 0, back.out_height);
    if (g_.dx && widened)
      from_float(p_.type, dx, static_cast<uint16_t*>(g_.dx) + n * x_image_, count * x_image_);
  }

  const Tucker2GradParams& g_;
  const Tucker2Params& p_;
  float* const scratch_;
  const int64_t grad_image_, x_image_, t1_image_, t2_image_, dz2_image_, dz1_image_;  // in numbers
};

// The zeros that the phases of an upsampling core read around `size` input pixels.
template <class F>
int64_t border_of(int64_t stride, int64_t size, const F& phase) {
  int64_t border = 0;
  for (int64_t a = 0; a < stride; ++a) {
    const Comb c = phase(a);
    if (c.taps && c.count) border = larger(border, larger(c.taps - 1 - c.source, c.source + c.count - size));
  }
  return border;
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
    back.padding_h = border_of(p.stride_h, p.out_height, [&](int64_t a) { return comb_h(back, a); });
    back.padding_w = border_of(p.stride_w, p.out_width, [&](int64_t a) { return comb_w(back, a); });
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
  g.group = clamp(larger(g.plan.group_images, kChunkPixels / plane), 1, ceil_div(p.images, threads));

  int64_t at = round_up(g.plan.scratch_floats, 16);
  auto take = [&](bool needed, int64_t floats) {
    const int64_t here = at;
    at += needed ? round_up(g.group * floats, 16) : 0;
    return here;
  };
  const bool widens = p.type != Tucker2Type::float32, kept_widens = g.kept != Tucker2Type::float32;
  g.grad_at = take(widens || g.y, p.features * plane);
  g.x_at = take(widens && g.first, p.channels * p.height * p.width);
  g.dx_at = take(widens && g.dx, p.channels * p.height * p.width);
  g.t1_at = take(kept_widens && g.core, padded_height(p) * padded_width(p) * p.rank_in);
  g.t2_at = take(kept_widens && g.last, plane * p.rank_out);
  g.dz2_at = take(g.core, padded_height(back) * padded_width(back) * p.rank_out);
  g.dz1_at = take(g.first, p.height * p.width * p.rank_in);
  g.scratch_floats = at;
}

void tucker2_gradients(const Tucker2GradParams& g, int64_t begin, int64_t end, float* scratch) {
  const FlushDenormals flush;
  Backward(g, scratch).run(begin, end);
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores become visible before the call ends
#endif
}

}  // namespace kegfast::KEGFAST_ISA
