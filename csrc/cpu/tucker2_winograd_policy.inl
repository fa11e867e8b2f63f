// Whether a core runs by Winograd's filtering, and in tiles of which size.
#pragma once

#include "cpu/integers.inl"
#include "cpu/tucker2_number.inl"
#include "tucker2.h"

namespace kegfast::KEGFAST_ISA {
namespace {

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

// Whether it should: enough pixels for the GEMMs, whose weights are 16 / 9 or more of the direct ones, and at
// stride 2, which gains least at 25 / 9, tiles that are mostly whole and twice the pixels.
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

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
