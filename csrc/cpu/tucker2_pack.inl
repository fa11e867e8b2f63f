// The three factors in their packed form.
#pragma once

#include "cpu/tucker2_factor.inl"
#include "cpu/tucker2_plan.inl"
#if !defined(KEGFAST_PAIRS)
#include "cpu/tucker2_winograd.inl"
#endif

namespace kegfast::KEGFAST_ISA {

namespace {

// A core run backwards with its taps in forward order, phase by phase.
void pack_phases(const Tucker2Params& p, const Tucker2Factor& core, float* out) {
  const int64_t bytes = core.type == Tucker2Type::float32 ? 4 : 2;
  for (int64_t a = 0; a < p.up.stride_h; ++a)
    for (int64_t b = 0; b < p.up.stride_w; ++b) {
      const int64_t taps_h = phase_h(p, a).taps, taps_w = phase_w(p, b).taps;
      if (taps_h * taps_w == 0) continue;
      Tucker2Factor phase = core;
      phase.data = static_cast<const char*>(core.data) + (a * core.tap_h + b * core.tap_w) * bytes;
      phase.tap_h *= p.up.stride_h, phase.tap_w *= p.up.stride_w;
      const Window window{taps_h * taps_w, words(p.rank_in)};
      pack_factor(phase, p.rank_out, p.rank_in, taps_w, window, true, out);
      out += packed_floats(p.rank_out, window);
    }
}

}  // namespace

void tucker2_pack(const Tucker2Params& p, const Tucker2Plan& plan, const Tucker2Factor& first,
                  const Tucker2Factor& core, const Tucker2Factor& last, bool all, float* packed) {
  packed[0] = packed_layout(p);
  const int64_t channels = words(p.channels) * kPair;
  pack_factor(first, p.rank_in, channels, 1, {1, words(p.channels)}, p.channels_last, packed + plan.first_at);
  if (p.up.on)
    pack_phases(p, core, packed + plan.core_at);
  else if (all || !plan.winograd)
    pack_factor(core, p.rank_out, p.rank_in, p.kernel_w, core_window(p), true, packed + plan.core_at);
#if !defined(KEGFAST_PAIRS)
  if (winograd_fits(p) && (all || plan.winograd)) {
    const auto pack = p.stride_h == 2         ? pack_winograd<5>
                      : winograd_edge(p) == 2 ? pack_winograd<4>
                                              : pack_winograd<6>;
    pack(p, core, packed + plan.winograd_at);
  }
#endif
  if (p.channels_last) {
    pack_factor(last, p.features, p.rank_out, 1, {1, words(p.rank_out)}, true, packed + plan.last_at);
  } else {
    const int64_t row = words(p.rank_out) * kPair;
    for (int64_t k = 0; k < p.features; ++k)
      for (int64_t r = 0; r < row; ++r)
        put(packed + plan.last_at, k * row + r,
            r < last.inputs ? element(last, k * last.row + r * last.input) : 0.0f);
  }
}

}  // namespace kegfast::KEGFAST_ISA
