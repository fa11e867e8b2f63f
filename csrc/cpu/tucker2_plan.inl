// Blocking of tucker2: bands and groups of images, and where their scratch and the packed factors begin.
#pragma once

#include "cpu/tucker2_layout.inl"
#include "cpu/tucker2_winograd_policy.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int64_t padded_height(const Tucker2Params& p) {
  return p.height + 2 * p.padding_h;
}
constexpr int64_t padded_width(const Tucker2Params& p) {
  return p.width + 2 * p.padding_w;
}

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

// Taps of the largest window; Python sends larger ones to the unfused path.
constexpr int64_t kMaxSegments = 256;

constexpr int64_t kBandBytes = 32 << 10;       // of t2: stays in L1 between the core and the last factor
constexpr int64_t kWideBandBytes = 192 << 10;  // where the core's weights are what streams
constexpr int64_t kWindowBytes = 256 << 10;    // of t1: stays in L2

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

}  // namespace kegfast::KEGFAST_ISA
