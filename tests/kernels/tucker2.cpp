#include "tucker2.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <functional>

#include "check.h"

namespace check {
namespace {

using kegfast::Tucker2Form;
using kegfast::Tucker2Params;
using kegfast::Tucker2Plan;
using kegfast::Tucker2Type;
using Values = std::vector<double>;

struct Case {
  const char* name;
  int64_t images, channels, height, width, rank_in, rank_out, features, kernel_h, kernel_w;
  int64_t stride_h = 1, stride_w = 1, padding_h = 1, padding_w = 1, dilation_h = 1, dilation_w = 1;
  int64_t winograd = 0;  // the edge of its tiles that the case is for
};
constexpr Case kCases[] = {
    {"3x3", 2, 16, 9, 11, 8, 8, 24, 3, 3},
    {"lenet", 3, 6, 14, 14, 3, 8, 16, 5, 5, 1, 1, 0, 0},
    {"rank 1", 5, 3, 8, 8, 1, 1, 1, 3, 3, 3, 3},
    {"rank 2", 2, 7, 9, 11, 2, 2, 5, 3, 2, 2, 1, 1, 2},
    {"ranks above channels", 1, 2, 6, 7, 5, 19, 3, 2, 2},
    {"1x1 strided", 2, 5, 20, 3, 4, 3, 9, 1, 1, 3, 2, 1, 0},
    {"11x7", 1, 16, 20, 23, 9, 17, 33, 11, 7, 1, 1, 5, 3},
    {"dilated", 2, 5, 12, 15, 4, 3, 9, 3, 5, 1, 1, 3, 2, 2, 3},
    {"stride beyond kernel", 2, 4, 17, 19, 6, 4, 5, 2, 2, 5, 4, 0, 0},
    {"padding beyond kernel", 2, 4, 5, 6, 3, 4, 5, 2, 3, 1, 1, 3, 4},
    {"many small images", 11, 32, 7, 7, 48, 40, 20, 3, 3},
    {"several bands", 1, 12, 61, 58, 24, 16, 20, 3, 3},
    {"one pixel", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0},
    {"one column", 2, 3, 5, 1, 2, 2, 4, 2, 1, 1, 1, 0, 0},
    {"tails of 1, 7 and 2", 2, 36, 8, 9, 33, 39, 50, 3, 3},
    {"tails of 3 and 8, dilated", 1, 33, 12, 11, 19, 40, 20, 3, 3, 1, 1, 2, 2, 2, 2},
    {"three taps at once", 2, 9, 12, 37, 20, 16, 24, 3, 3},
    {"five taps at once", 2, 20, 14, 23, 5, 13, 24, 5, 5, 1, 1, 2, 2},
    {"strided, large factors", 2, 64, 9, 14, 64, 72, 40, 3, 3, 2, 2},
    {"winograd 2, odd sizes", 3, 20, 9, 11, 32, 48, 24, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    {"winograd 2, small images", 9, 16, 7, 7, 32, 32, 17, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    {"winograd 2, stride 2", 1, 8, 25, 30, 64, 64, 20, 3, 3, 2, 2, 1, 1, 1, 1, 2},
    {"winograd 4", 2, 8, 15, 22, 16, 32, 20, 3, 3, 1, 1, 1, 1, 1, 1, 4},
};

// f(part, its scratch) for two parts, side by side where there are threads.
template <class F>
void in_halves(int64_t scratch_floats, const F& f) {
  torch::stable::parallel_for(0, 2, 1, [&](int64_t from, int64_t to) {
    const Memory<float> scratch(scratch_floats);
    for (int64_t part = from; part < to; ++part) f(static_cast<int>(part), scratch.get());
  });
}

// A call and its definition in double; images as (N, C, H, W) there.
struct Call {
  Case c;
  Kind kind;
  bool channels_last, relu;
  int64_t out_h, out_w;
  Values x, first, core, last, bias;  // as stored
  Values t1, t2, y;                   // t1 with its border

  Call(const Case& given, Kind kind, bool channels_last, bool relu)
      : c(given), kind(kind), channels_last(channels_last), relu(relu) {
    out_h = (c.height + 2 * c.padding_h - c.dilation_h * (c.kernel_h - 1) - 1) / c.stride_h + 1;
    out_w = (c.width + 2 * c.padding_w - c.dilation_w * (c.kernel_w - 1) - 1) / c.stride_w + 1;
    Numbers numbers(static_cast<uint64_t>(c.channels * c.height + c.rank_in));
    const auto stored = [&](int64_t count, int64_t fan) {
      return Stored(kind, numbers.take(count, 1 / std::sqrt(static_cast<double>(fan)))).values();
    };
    const int64_t taps = c.kernel_h * c.kernel_w;
    x = stored(c.images * c.channels * c.height * c.width, 1);
    first = stored(c.rank_in * c.channels, c.channels);
    core = stored(c.rank_out * c.rank_in * taps, c.rank_in * taps);
    last = stored(c.features * c.rank_out, c.rank_out);
    bias = Stored(Kind::float32, numbers.take(c.features)).values();
    forward();
  }

  std::string what() const {
    return std::string("tucker2 ") + c.name + ", " + name(kind) +
           (channels_last ? ", channels_last" : ", planes") + (relu ? ", relu" : "");
  }
  int64_t padded_h() const { return c.height + 2 * c.padding_h; }
  int64_t padded_w() const { return c.width + 2 * c.padding_w; }
  int64_t t1_at(int64_t n, int64_t h, int64_t w) const {
    return ((n * padded_h() + h) * padded_w() + w) * c.rank_in;
  }
  int64_t t2_at(int64_t n, int64_t p, int64_t q) const { return ((n * out_h + p) * out_w + q) * c.rank_out; }

  // f(n, p, q, at t2, at t1, tap) of every tap of every output pixel.
  template <class F>
  void each_tap(const F& f) const {
    for (int64_t n = 0; n < c.images; ++n)
      for (int64_t p = 0; p < out_h; ++p)
        for (int64_t q = 0; q < out_w; ++q)
          for (int64_t i = 0; i < c.kernel_h; ++i)
            for (int64_t j = 0; j < c.kernel_w; ++j)
              f(t2_at(n, p, q),
                t1_at(n, p * c.stride_h + i * c.dilation_h, q * c.stride_w + j * c.dilation_w),
                i * c.kernel_w + j);
  }
  // f(at x of channel 0, at t1) of every input pixel; f(at y of feature 0, at t2) of every output pixel.
  template <class F>
  void each_input(const F& f) const {
    for (int64_t n = 0; n < c.images; ++n)
      for (int64_t h = 0; h < c.height; ++h)
        for (int64_t w = 0; w < c.width; ++w)
          f((n * c.channels * c.height + h) * c.width + w, t1_at(n, h + c.padding_h, w + c.padding_w));
  }
  template <class F>
  void each_output(const F& f) const {
    for (int64_t n = 0; n < c.images; ++n)
      for (int64_t p = 0; p < out_h; ++p)
        for (int64_t q = 0; q < out_w; ++q) f((n * c.features * out_h + p) * out_w + q, t2_at(n, p, q));
  }

  void forward() {
    const int64_t plane = c.height * c.width, out_plane = out_h * out_w, taps = c.kernel_h * c.kernel_w;
    t1.assign(c.images * padded_h() * padded_w() * c.rank_in, 0);
    t2.assign(c.images * out_plane * c.rank_out, 0);
    y.assign(c.images * out_plane * c.features, 0);
    each_input([&](int64_t from, int64_t to) {
      for (int64_t r = 0; r < c.rank_in; ++r)
        for (int64_t i = 0; i < c.channels; ++i)
          t1[to + r] += first[r * c.channels + i] * x[from + i * plane];
    });
    each_tap([&](int64_t to, int64_t from, int64_t tap) {
      for (int64_t o = 0; o < c.rank_out; ++o)
        for (int64_t r = 0; r < c.rank_in; ++r)
          t2[to + o] += core[(o * c.rank_in + r) * taps + tap] * t1[from + r];
    });
    each_output([&](int64_t to, int64_t from) {
      for (int64_t k = 0; k < c.features; ++k) {
        double& sum = y[to + k * out_plane] = bias[k];
        for (int64_t r = 0; r < c.rank_out; ++r) sum += last[k * c.rank_out + r] * t2[from + r];
        if (relu) sum = std::max(sum, 0.0);
      }
    });
  }

  // Of sum g y with g = dL/dy, already 0 where ReLU stopped it.
  struct Gradients {
    Values x, first, core, last, bias;
  };
  Gradients gradients(const Values& g) const {
    const int64_t plane = c.height * c.width, out_plane = out_h * out_w, taps = c.kernel_h * c.kernel_w;
    Gradients d{Values(x.size()), Values(first.size()), Values(core.size()), Values(last.size()),
                Values(c.features)};
    Values d1(t1.size()), d2(t2.size());
    each_output([&](int64_t at, int64_t inner) {
      for (int64_t k = 0; k < c.features; ++k) {
        const double slope = g[at + k * out_plane];
        d.bias[k] += slope;
        for (int64_t r = 0; r < c.rank_out; ++r) {
          d.last[k * c.rank_out + r] += slope * t2[inner + r];
          d2[inner + r] += slope * last[k * c.rank_out + r];
        }
      }
    });
    each_tap([&](int64_t outer, int64_t inner, int64_t tap) {
      for (int64_t o = 0; o < c.rank_out; ++o)
        for (int64_t r = 0; r < c.rank_in; ++r) {
          d.core[(o * c.rank_in + r) * taps + tap] += d2[outer + o] * t1[inner + r];
          d1[inner + r] += d2[outer + o] * core[(o * c.rank_in + r) * taps + tap];
        }
    });
    each_input([&](int64_t at, int64_t inner) {
      for (int64_t r = 0; r < c.rank_in; ++r)
        for (int64_t i = 0; i < c.channels; ++i) {
          d.first[r * c.channels + i] += d1[inner + r] * x[at + i * plane];
          d.x[at + i * plane] += d1[inner + r] * first[r * c.channels + i];
        }
    });
    return d;
  }
};

// (N, C, H, W) to and from the order of a layout.
Values laid_out(const Values& v, int64_t images, int64_t channels, bool channels_last, bool back = false) {
  if (!channels_last) return v;
  const int64_t plane = static_cast<int64_t>(v.size()) / images / channels;
  Values to(v.size());
  for (int64_t n = 0; n < images; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < plane; ++i) {
        const int64_t planes = (n * channels + c) * plane + i, pixels = (n * plane + i) * channels + c;
        (back ? to[planes] : to[pixels]) = v[back ? pixels : planes];
      }
  return to;
}

Tucker2Type type_of(Kind kind) {
  return kind == Kind::float32    ? Tucker2Type::float32
         : kind == Kind::bfloat16 ? Tucker2Type::bfloat16
                                  : Tucker2Type::float16;
}

// A call's operands in memory as kernels read them.
struct Operands {
  Stored x, first, core, last, bias;
  Tucker2Params p{};

  explicit Operands(const Call& call)
      : x(call.kind, laid_out(call.x, call.c.images, call.c.channels, call.channels_last)),
        first(call.kind, call.first),
        core(call.kind, call.core),
        last(call.kind, call.last),
        bias(Kind::float32, call.bias) {
    const Case& c = call.c;
    p.images = c.images, p.channels = c.channels, p.rank_in = c.rank_in, p.rank_out = c.rank_out;
    p.features = c.features, p.height = c.height, p.width = c.width;
    p.out_height = call.out_h, p.out_width = call.out_w, p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w;
    p.stride_h = c.stride_h, p.stride_w = c.stride_w, p.padding_h = c.padding_h, p.padding_w = c.padding_w;
    p.dilation_h = c.dilation_h, p.dilation_w = c.dilation_w;
    p.channels_last = call.channels_last, p.relu = call.relu;
    p.winograd = c.winograd, p.form = c.winograd ? Tucker2Form::winograd : Tucker2Form::direct;
    p.type = type_of(call.kind);
    p.x = x.data(), p.bias = static_cast<const float*>(bias.data());
    p.x_image = c.channels * c.height * c.width;
    p.x_channel = call.channels_last ? 1 : c.height * c.width;
    p.x_pixel = call.channels_last ? c.channels : 1;
    p.x_row = p.x_pixel * c.width;
  }
  kegfast::Tucker2Factor factor(const Stored& w, int64_t outputs, int64_t inputs, int64_t h,
                                int64_t width) const {
    return {w.data(), p.type, inputs * h * width, h * width, width, 1, outputs, inputs};
  }
  kegfast::Tucker2Factor first_factor() const { return factor(first, p.rank_in, p.channels, 1, 1); }
  kegfast::Tucker2Factor core_factor() const {
    return factor(core, p.rank_out, p.rank_in, p.kernel_h, p.kernel_w);
  }
  kegfast::Tucker2Factor last_factor() const { return factor(last, p.features, p.rank_out, 1, 1); }
};

constexpr double kTolerance[] = {5e-6, 1.6e-2, 2e-3};
constexpr double kGradientTolerance[] = {1e-5, 2e-2, 4e-3};

// y in two shares of rows, as two threads would; keep: t1 and t2 as well, whole images then.
Values run_forward(Operands& of, const Call& call, Memory<float>* t1, Memory<float>* t2) {
  Tucker2Params& p = of.p;
  const Tucker2Plan plan = KEGFAST_SELECT(tucker2_plan)(p, t1 ? 1 : 2);
  if (call.c.winograd) that(plan.winograd != 0, call.what() + " runs by Winograd");
  Memory<float> packed(plan.packed_floats);
  KEGFAST_SELECT(tucker2_pack)(p, plan, of.first_factor(), of.core_factor(), of.last_factor(), true,
                               packed.get());
  that(packed.get()[0] == plan.packed_layout, call.what() + " knows its packed factors");
  const Stored y(call.kind, p.images * p.features * p.out_height * p.out_width);
  p.packed = packed.get(), p.y = y.data();
  p.t1 = t1 ? t1->get() : nullptr, p.t2 = t2 ? t2->get() : nullptr;
  const int64_t rows = p.images * p.out_height, half = t1 ? p.images / 2 * p.out_height : rows / 2;
  in_halves(plan.scratch_floats, [&](int part, float* scratch) {
    KEGFAST_SELECT(tucker2_rows)(p, plan, part ? half : 0, part ? rows : half, scratch);
  });
  return laid_out(y.values(), p.images, p.features, p.channels_last, true);
}

// One part's sums over its images.
struct Sums {
  std::vector<float> first, core, last;
  Values bias;

  void set(kegfast::Tucker2GradParams& g) {
    g.first = first.data(), g.core = core.data(), g.last = last.data(), g.bias = bias.data();
  }
  void add(const Sums& other) {
    const auto add = [](auto& to, const auto& from) {
      std::transform(to.begin(), to.end(), from.begin(), to.begin(), std::plus<>());
    };
    add(first, other.first), add(core, other.core), add(last, other.last), add(bias, other.bias);
  }
};

kegfast::Tucker2Factor transposed(const kegfast::Tucker2Factor& w, int64_t bytes, int64_t h, int64_t width,
                                  bool reverse) {
  kegfast::Tucker2Factor t{w.data, w.type, w.input, w.row, w.tap_h, w.tap_w, w.inputs, w.outputs};
  if (!reverse) return t;
  t.data = static_cast<const char*>(w.data) + ((h - 1) * w.tap_h + (width - 1) * w.tap_w) * bytes;
  t.tap_h = -w.tap_h, t.tap_w = -w.tap_w;
  return t;
}

// Sums as the kernels leave them (see Tucker2GradParams), in a weight's own order.
Values weight(const float* sums, std::array<int64_t, 4> sizes, std::array<int64_t, 4> steps) {
  Values found;
  for (int64_t o = 0; o < sizes[0]; ++o)
    for (int64_t i = 0; i < sizes[1]; ++i)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t w = 0; w < sizes[3]; ++w)
          found.push_back(sums[o * steps[0] + i * steps[1] + h * steps[2] + w * steps[3]]);
  return found;
}

void backward(Operands& of, const Call& call, const Memory<float>& t1, const Memory<float>& t2,
              const Values& y) {
  const Case& c = call.c;
  const Tucker2Params& p = of.p;
  Values slopes = Numbers(7).take(static_cast<int64_t>(y.size()));
  slopes = Stored(call.kind, slopes).values();
  const Stored grad(call.kind, laid_out(slopes, p.images, p.features, p.channels_last));
  const Stored stopped(call.kind, laid_out(y, p.images, p.features, p.channels_last));
  const Stored dx(call.kind, static_cast<int64_t>(call.x.size()));
  const Sums none{std::vector<float>(call.first.size()), std::vector<float>(call.core.size()),
                  std::vector<float>(call.last.size()), Values(p.features)};
  Sums sums[2] = {none, none};
  kegfast::Tucker2GradParams g{};
  g.forward = p, g.forward.t1 = t1.get(), g.forward.t2 = t2.get();
  g.kept = Tucker2Type::float32;
  g.grad = grad.data(), g.y = call.relu ? stopped.data() : nullptr;
  g.grad_channels_last = p.channels_last, g.dx = dx.data();
  sums[0].set(g);
  KEGFAST_SELECT(tucker2_gradient_plan)(g, 1);
  Memory<float> packed(g.plan.packed_floats);
  const int64_t bytes = call.kind == Kind::float32 ? 4 : 2;
  KEGFAST_SELECT(tucker2_pack)
  (g.back, g.plan, transposed(of.last_factor(), bytes, 1, 1, false),
   transposed(of.core_factor(), bytes, c.kernel_h, c.kernel_w, !g.back.up.on),
   transposed(of.first_factor(), bytes, 1, 1, false), false, packed.get());
  g.back.packed = packed.get();
  in_halves(g.scratch_floats, [&](int part, float* scratch) {
    kegfast::Tucker2GradParams mine = g;
    sums[part].set(mine);
    KEGFAST_SELECT(tucker2_gradients)(mine, p.images * part / 2, p.images * (part + 1) / 2, scratch);
  });
  sums[0].add(sums[1]);
  const auto& [dfirst, dcore, dlast, dbias] = sums[0];

  for (size_t i = 0; call.relu && i < y.size(); ++i)
    if (y[i] <= 0) slopes[i] = 0;
  const Call::Gradients want = call.gradients(slopes);
  const auto compare = [&](const Values& got, const Values& wanted, const char* which) {
    double most = 0;
    for (const double value : wanted) most = std::max(most, std::fabs(value));
    close(got, wanted, kGradientTolerance[static_cast<int>(call.kind)],
          call.what() + ", gradient of " + which, most);
  };
  const bool pixels = p.channels_last;
  compare(laid_out(dx.values(), p.images, p.channels, pixels, true), want.x, "x");
  compare(weight(dfirst.data(), {c.rank_in, c.channels, 1, 1},
                 {pixels ? c.channels : 1, pixels ? 1 : c.rank_in, 0, 0}),
          want.first, "first");
  const bool row = c.dilation_w == 1;
  const int64_t length = row ? c.kernel_w * c.rank_in : c.rank_in, segment = c.rank_out * length;
  compare(weight(dcore.data(), {c.rank_out, c.rank_in, c.kernel_h, c.kernel_w},
                 {length, 1, row ? segment : c.kernel_w * segment, row ? c.rank_in : segment}),
          want.core, "core");
  compare(weight(dlast.data(), {c.features, c.rank_out, 1, 1},
                 {pixels ? 1 : c.rank_out, pixels ? c.features : 1, 0, 0}),
          want.last, "last");
  compare(dbias, want.bias, "bias");
}

void one(const Case& c, Kind kind, bool channels_last, bool relu) {
  const Call call(c, kind, channels_last, relu);
  Operands of(call);
  const double tolerance = kTolerance[static_cast<int>(kind)] * (c.winograd == 4 ? 3 : 1);
  close(run_forward(of, call, nullptr, nullptr), call.y, tolerance, call.what());
  Memory<float> t1(static_cast<int64_t>(call.t1.size())), t2(static_cast<int64_t>(call.t2.size()));
  std::fill_n(t1.get(), call.t1.size(), NAN), std::fill_n(t2.get(), call.t2.size(), NAN);
  const Values y = run_forward(of, call, &t1, &t2);
  close(y, call.y, tolerance, call.what() + ", kept intermediates");
  const bool fits = c.stride_h * c.stride_w == 1 && (c.kernel_h - 1) * c.dilation_h >= c.padding_h &&
                    (c.kernel_w - 1) * c.dilation_w >= c.padding_w;
  if (fits || c.dilation_h * c.dilation_w == 1) backward(of, call, t1, t2, y);
}

// What is below the normal numbers is zero inside, and a number again for the caller.
void denormals() {
  Call call({"denormals", 1, 8, 6, 6, 4, 4, 8, 3, 3}, Kind::float32, true, false);
  for (double& value : call.x) value = 1e-40;
  for (double& value : call.bias) value = 0;
  Operands of(call);
  const Values y = run_forward(of, call, nullptr, nullptr);
  close(y, Values(y.size()), 0, "tucker2 flushes denormals");
  volatile float least = 1e-40f;
  that(least * 0.5f > 0, "tucker2 restores the caller's mode");
}

}  // namespace

void tucker2() {
  for (const Case& c : kCases)
    for (const bool channels_last : {false, true}) {
      one(c, Kind::float32, channels_last, false);
      one(c, Kind::float32, channels_last, true);
      if (c.winograd) continue;
      one(c, Kind::bfloat16, channels_last, true);
      one(c, Kind::float16, channels_last, false);
    }
  denormals();
}

}  // namespace check
