// The packed form of the factors, and the check that it still is that of these factors.
#pragma once

#include "cpu/tucker2_sweep.inl"
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

namespace {

// f(factor, offset in it, bytes into packed) for samples of all three factors, as long as it returns true.
template <class F>
bool each_packed_sample(const Tucker2Params& p, const Tucker2Plan& plan, const Tucker2Factor& first,
                        const Tucker2Factor& core, const Tucker2Factor& last, const F& f) {
  const Window first_window{1, words(p.channels)}, window = core_window(p), last_window{1, words(p.rank_out)};
  const auto sample = [&f](const Tucker2Factor& w, int64_t outputs, int64_t inputs, int64_t taps_w, Window of,
                           int64_t packed_at, const auto& place) {
    return each_sample(w, outputs, inputs, taps_w, of, place,
                       [&](int64_t from, int64_t to) { return f(w, from, packed_at * 4 + to); });
  };
  const auto packed = [](int64_t outputs, Window of, bool folds) {
    return [=](int64_t o, int64_t s, int64_t word) { return packed_place(outputs, of, folds, o, s, word); };
  };
  const auto rows = [&](int64_t o, int64_t, int64_t word) { return o * words(p.rank_out) + word; };
  return sample(first, p.rank_in, words(p.channels) * kPair, 1, first_window, plan.first_at,
                packed(p.rank_in, first_window, p.channels_last)) &&
         sample(core, p.rank_out, p.rank_in, p.kernel_w, window, plan.core_at,
                packed(p.rank_out, window, true)) &&
         (p.channels_last ? sample(last, p.features, p.rank_out, 1, last_window, plan.last_at,
                                   packed(p.features, last_window, true))
                          : sample(last, p.features, p.rank_out, 1, last_window, plan.last_at, rows));
}

}  // namespace

bool tucker2_packed_from(const Tucker2Params& p, const Tucker2Plan& plan, const Tucker2Factor& first,
                         const Tucker2Factor& core, const Tucker2Factor& last, const float* packed) {
  if (packed[0] != plan.packed_layout) return false;
  return each_packed_sample(
      p, plan, first, core, last, [packed](const Tucker2Factor& w, int64_t from, int64_t to) {
        float there[1];
        put(there, 0, from == kPadding ? 0.0f : element(w, from));
        return memcmp(reinterpret_cast<const char*>(packed) + to, there, kNumberBytes) == 0;
      });
}

int64_t tucker2_samples(const Tucker2Params& p, const Tucker2Plan& plan, const Tucker2Factor& first,
                        const Tucker2Factor& core, const Tucker2Factor& last, Tucker2Sample* samples) {
  int64_t count = 0;
  each_packed_sample(p, plan, first, core, last, [&](const Tucker2Factor& w, int64_t from, int64_t to) {
    if (from != kPadding)
      samples[count++] = {static_cast<const Number*>(w.data) + from,
                          reinterpret_cast<const char*>(p.packed) + to};
    return true;
  });
  return count;
}

}  // namespace kegfast::KEGFAST_ISA
