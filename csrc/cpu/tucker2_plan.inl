// Blocking of tucker2 and the packed form of its factors.
#pragma once

#include "cpu/integers.inl"
#include "cpu/tucker2_convert.inl"
#include "cpu/tucker2_tile.inl"
#include "tucker2.h"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t padded_height(const Tucker2Params& p) {
  return p.height + 2 * p.padding_h;
}
constexpr int64_t padded_width(const Tucker2Params& p) {
  return p.width + 2 * p.padding_w;
}

// With dilation 1 a kernel row reads kw * R1 contiguous numbers of t1; otherwise every tap is a segment of its
// own.
struct Window {
  int64_t segments, length;  // length in words
};
constexpr Window core_window(const Tucker2Params& p) {
  return p.dilation_w == 1 ? Window{p.kernel_h, p.kernel_w * words(p.rank_in)}
                           : Window{p.kernel_h * p.kernel_w, words(p.rank_in)};
}

// Outputs of a factor that are held alike. Lane packing: where half a vector or less is left, each of them has
// `group` lanes, for as many consecutive k.
struct Part {
  int64_t first, outputs;
  int group;
};

constexpr int64_t kLeastFolded =
    32;  // steps of k below which folding the lanes of a tail costs more than it saves

// What pays: a tail beside whole vectors; 8 and the rest where there is none, if segments end with both.
constexpr Part part_from(int64_t first, int64_t outputs, Window window) {
  const int64_t left = outputs - first, vectors = left / kLanes * kLanes, rest = left - vectors;
#if defined(KEGFAST_AMX)
  const bool folds = outputs <= 8;
#else
  const bool folds = outputs <= 8 || window.segments * window.length >= kLeastFolded;
#endif
  const int64_t most = outputs < kLanes && window.length % 2 == 0 ? 12 : 8;
  if (kLanes < 16 || rest == 0 || rest > most || !folds) return {first, left, 1};
  if (vectors > 0) return {first, vectors, 1};
  return left > 8 ? Part{first, 8, 2} : Part{first, left, left > 4 ? 2 : left > 2 ? 4 : 8};
}

// A packed factor: its parts one after the other, each [vectors of outputs][segments][length / group][kLanes].
constexpr int64_t part_floats(const Part& part, Window window) {
  return round_up(part.outputs * part.group, kLanes) * window.segments * ceil_div(window.length, part.group);
}

// f(part, offset of its packed floats) for all parts. Planes of x are read k-major, one channel at a time: their first
// factor cannot pack lanes (`folds`).
template <class F>
constexpr int64_t for_parts(int64_t outputs, Window window, bool folds, const F& f) {
  int64_t at = 0;
  for (int64_t first = 0; first < outputs;) {
    const Part part = folds ? part_from(first, outputs, window) : Part{first, outputs, 1};
    f(part, at);
    at += part_floats(part, window);
    first += part.outputs;
  }
  return at;
}
constexpr int64_t packed_floats(int64_t outputs, Window window, bool folds = true) {
  return for_parts(outputs, window, folds, [](const Part&, int64_t) {});
}

// The header of a packed buffer: what its layout depends on beside the factors' shapes.
constexpr int64_t kHeader = 16;
float packed_layout(const Tucker2Params& p) {
  return kLanes + 64 * p.channels_last + 128 * (p.dilation_w == 1) + 256 * kPair;
}

// One axis of one phase of an upsampling core: taps phase, phase + stride, ... make the output pixels first, first
// + stride, ... from input pixels source, source + 1, ..., the taps running against them.
struct PhaseAxis {
  int64_t taps, first, count, source;
};
constexpr PhaseAxis phase_axis(int64_t kernel, int64_t stride, int64_t padding, int64_t size, int64_t phase) {
  const int64_t first = ((phase - padding) % stride + stride) % stride;
  return {phase < kernel ? ceil_div(kernel - phase, stride) : 0, first,
          first < size ? ceil_div(size - first, stride) : 0, (first + padding - phase) / stride};
}
constexpr PhaseAxis phase_h(const Tucker2Params& p, int64_t phase) {
  return phase_axis(p.kernel_h, p.up.stride_h, p.up.padding_h, p.out_height, phase);
}
constexpr PhaseAxis phase_w(const Tucker2Params& p, int64_t phase) {
  return phase_axis(p.kernel_w, p.up.stride_w, p.up.padding_w, p.out_width, phase);
}

int64_t core_floats(const Tucker2Params& p) {
  if (!p.up.on) return packed_floats(p.rank_out, core_window(p));
  int64_t floats = 0;
  for (int64_t a = 0; a < p.up.stride_h; ++a)
    for (int64_t b = 0; b < p.up.stride_w; ++b)
      floats += packed_floats(p.rank_out, {phase_h(p, a).taps * phase_w(p, b).taps, words(p.rank_in)});
  return floats;
}

constexpr int64_t kNumberBytes = sizeof(Number);

// Whether x is first copied, row by row, into what the tiles read: numbers of another type, or bfloat16 of
// which two along k are not one word.
bool gathers(const Tucker2Params& p) {
  if (kPair == 1) return p.type != Tucker2Type::float32;
  return !p.channels_last || p.channels % 2 || p.x_pixel % 2 || p.x_row % 2;
}

constexpr int64_t kGatherBytes = 32 << 10;
int64_t gathered_rows(const Tucker2Params& p) {
  return clamp(kGatherBytes / (4 * p.width * words(p.channels)), 1, p.height);
}

constexpr int64_t kMaxSegments =
    256;  // taps of the largest window; functional.py sends larger ones to the unfused path

constexpr int64_t kBandBytes = 32 << 10;       // of t2: stays in L1 between the core and the last factor
constexpr int64_t kWideBandBytes = 192 << 10;  // where the core's weights are what streams
constexpr int64_t kWindowBytes = 256 << 10;    // of t1: stays in L2

// Winograd's output tiles, whose F(4x4, 3x3) is for stride 1, and input tiles.
constexpr int64_t winograd_edge(const Tucker2Params& p) {
  return p.stride_h == 1 ? p.winograd : smaller(p.winograd, 2);
}
constexpr int winograd_side(int64_t edge, int64_t stride) {
  return static_cast<int>(stride == 1 ? edge + 2 : 2 * edge + 1);
}
constexpr int winograd_points(const Tucker2Params& p) {
  const int side = winograd_side(winograd_edge(p), p.stride_h);
  return side * side;
}

// The least ranks whose products outweigh the transforms.
constexpr int64_t winograd_ranks(const Tucker2Params& p) {
  return p.stride_h == 2 ? 64 : winograd_edge(p) == 4 ? 16 : 32;
}

// Whether the core may run by Winograd at all: the transforms work on whole vectors of channels.
bool winograd_fits(const Tucker2Params& p) {
  return kPair == 1 && p.winograd && !p.up.on && p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h <= 2 &&
         p.stride_w == p.stride_h && p.dilation_h == 1 && p.dilation_w == 1 &&
         smaller(p.rank_in, p.rank_out) >= winograd_ranks(p) && p.rank_in % kLanes == 0 &&
         p.rank_out % kLanes == 0 &&
         // oneDNN's convolutions of planes sum in smaller blocks: beyond these ranks our error would be 1.6
         // of theirs.
         (winograd_edge(p) == 4 || p.channels_last || larger(p.rank_in, p.rank_out) <= 192);
}

// Whether it should: enough pixels for the GEMMs, whose weights are 16 / 9 or more of the direct ones, and at stride
// 2, which gains least at 25 / 9, tiles that are mostly whole and twice the pixels.
bool winograd_wins(const Tucker2Params& p, int64_t threads) {
  if (!winograd_fits(p)) return false;
  if (p.form != Tucker2Form::automatic) return p.form == Tucker2Form::winograd;
  const int64_t edge = winograd_edge(p), image = ceil_div(p.out_height, edge) * ceil_div(p.out_width, edge);
  const int64_t tiles = p.images * image / threads;
  if (p.stride_h == 2 && 8 * image * winograd_points(p) > 7 * 9 * p.out_height * p.out_width) return false;
  return tiles * edge * edge >= larger(48, p.stride_h * larger(p.rank_in, p.rank_out));
}

// Outputs whose products a band holds at a time: with the inputs of a band they stay in L2.
constexpr int64_t winograd_share(const Tucker2Params& p) {
  return smaller(p.rank_out, 64);
}

constexpr int64_t band_tiles(const Tucker2Params& p) {
  return p.stride_h == 2 ? 32 : winograd_edge(p) == 4 ? 48 : 64;
}

// Floats from one point of `tiles` tiles to the next: a line more than they need, or the streams that a
// transform writes could all fall into one set of L1.
constexpr int64_t point_step(int64_t tiles, int64_t channels) {
  return tiles * channels + 16;
}

int64_t band_pixels(const Tucker2Params& p) {
  const int64_t weights = kNumberBytes * p.rank_in * p.rank_out * p.kernel_h * p.kernel_w;
  const int64_t bytes = weights > (200 << 10) ? kWideBandBytes : kBandBytes;
  return clamp(bytes / (kNumberBytes * p.rank_out), 64, 2048);
}

}  // namespace

Tucker2Plan tucker2_plan(const Tucker2Params& p, int64_t threads) {
  Tucker2Plan plan{};
  const int64_t row = padded_width(p) * words(p.rank_in);
  plan.winograd = winograd_wins(p, threads) ? winograd_edge(p) : 0;
  const int64_t edge = plan.winograd, pixels = edge ? edge * edge * band_tiles(p) : band_pixels(p),
                image_pixels = p.out_height * p.out_width;
  const int64_t halo = (p.kernel_h - 1) * p.dilation_h + 1;
  plan.band_rows = clamp(pixels / p.out_width, 1, p.out_height);
  plan.band_rows = ceil_div(p.out_height, ceil_div(p.out_height, plan.band_rows));  // alike
  if (edge) plan.band_rows = smaller(round_up(plan.band_rows, edge), p.out_height);
  plan.group_images = 1;
  if (2 * image_pixels <= pixels) {
    const int64_t fit = larger(1, kWindowBytes / (4 * row * padded_height(p)));
    plan.group_images = clamp(pixels / image_pixels, 1, smaller(fit, ceil_div(p.images, threads)));
  }
  if (p.up.on) plan.group_images = 1;
  const int64_t needed = (plan.band_rows - 1) * p.stride_h + halo;
  plan.t1_rows = smaller(padded_height(p), larger(needed, kWindowBytes / (4 * row)));
  if (plan.group_images > 1 || p.up.on) plan.t1_rows = padded_height(p);

  int64_t at = kHeader;
  auto take = [&at](int64_t floats) {
    const int64_t here = at;
    at += round_up(floats, 16);
    return here;
  };
  plan.first_at = take(packed_floats(p.rank_in, {1, words(p.channels)}, p.channels_last));
  plan.core_at = take(core_floats(p));
  plan.last_at = take(p.channels_last ? packed_floats(p.features, {1, words(p.rank_out)})
                                      : p.features * words(p.rank_out));
  const int64_t point = packed_floats(p.rank_out, {1, p.rank_in});
  plan.winograd_at = take(winograd_fits(p) ? winograd_points(p) * point : 0);
  plan.packed_floats = at;
  plan.packed_layout = packed_layout(p);

  at = 0;
  const int64_t band =
      plan.group_images > 1 ? plan.group_images * image_pixels : plan.band_rows * p.out_width;
  const bool convert = kPair == 1 && p.type != Tucker2Type::float32;
  plan.t1_at = take(plan.group_images * plan.t1_rows * row);
  plan.t2_at = take(band * words(p.rank_out));
  plan.planes_at = take(p.channels_last ? 0 : round_up(band, kLanes) * words(p.rank_out));
  const int64_t tiles =
      edge ? plan.group_images * ceil_div(plan.band_rows, edge) * ceil_div(p.out_width, edge) : 0;
  const int64_t tile_floats = point_step(tiles, p.rank_in) + point_step(tiles, winograd_share(p));
  plan.tiles_at = take(edge ? round_up(p.rank_in, 16) + winograd_points(p) * tile_floats : 0);
  plan.x_at = take(gathers(p) ? gathered_rows(p) * p.width * words(p.channels) : 0);
  plan.y_at = take(convert ? band * p.features : 0);
  plan.scratch_floats = at;
  return plan;
}

namespace {

float element(const Tucker2Factor& w, int64_t at) {
  if (w.type == Tucker2Type::float32) return static_cast<const float*>(w.data)[at];
  return half_bits_to_float(w.type, static_cast<const uint16_t*>(w.data)[at]);
}

// Where number k of a factor's segment s stands, for output 0; `inputs` and k count what was made even too.
struct Place {
  bool exists;
  int64_t at;
};
Place place_of(const Tucker2Factor& w, int64_t inputs, int64_t taps_w, Window window, int64_t s, int64_t k) {
  const int64_t number = s * window.length * kPair + k, tap = number / inputs, i = number % inputs;
  return {i < w.inputs, i * w.input + tap / taps_w * w.tap_h + tap % taps_w * w.tap_w};
}

void put(float* packed, int64_t number, float value) {
#if defined(KEGFAST_PAIRS)
  const Number bits = to_bfloat16(value);
  memcpy(reinterpret_cast<char*>(packed) + number * kNumberBytes, &bits, kNumberBytes);
#else
  packed[number] = value;
#endif
}

// `inputs` and `outputs` as the kernels count them: even where numbers come in pairs. Training packs in every
// step, so places are found once for all vectors, and each row of the factor is read from end to end.
void pack_part(const Tucker2Factor& w, const Part& part, int64_t inputs, int64_t taps_w, Window window,
               float* out) {
  constexpr int64_t kBlock = 256;
  Place from[kBlock];
  int64_t to[kBlock];  // in numbers, for the vector's first output
  const int channels = kLanes / part.group, together = part.group * kPair;
  const int64_t steps = ceil_div(window.length, part.group), numbers = steps * together;
  for (int64_t s = 0; s < window.segments; ++s)
    for (int64_t begin = 0; begin < numbers; begin += kBlock) {
      const int64_t count = smaller(kBlock, numbers - begin);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = begin + i;
        from[i] = place_of(w, inputs, taps_w, window, s, k);
        from[i].exists &= k < window.length * kPair;
        to[i] = k / together * kLanes * kPair + k % together;
      }
      for (int64_t o = 0; o < round_up(part.outputs, channels); ++o) {
        float* const vector = out + (o / channels * window.segments + s) * steps * kLanes;
        const int64_t lane = o % channels * together;
        const bool exists = part.first + o < w.outputs;
        for (int64_t i = 0; i < count; ++i)
          put(vector, to[i] + lane,
              exists && from[i].exists ? element(w, from[i].at + (part.first + o) * w.row) : 0.0f);
      }
    }
}

void pack_factor(const Tucker2Factor& w, int64_t outputs, int64_t inputs, int64_t taps_w, Window window,
                 bool folds, float* out) {
  for_parts(outputs, window, folds,
            [&](const Part& part, int64_t at) { pack_part(w, part, inputs, taps_w, window, out + at); });
}

}  // namespace

}  // namespace kegfast::KEGFAST_ISA
