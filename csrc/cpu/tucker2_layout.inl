// Where the numbers of a packed factor lie: windows of taps, parts of the outputs, phases of a strided core.
#pragma once

#include "cpu/integers.inl"
#include "cpu/tucker2_number.inl"
#include "tucker2.h"

namespace kegfast::KEGFAST_ISA {
namespace {

// With dilation 1 a kernel row reads kw * R1 contiguous numbers of t1; otherwise every tap is a segment of
// its own.
struct Window {
  int64_t segments, length;  // length in words
};
constexpr Window core_window(const Tucker2Params& p) {
  return p.dilation_w == 1 ? Window{p.kernel_h, p.kernel_w * words(p.rank_in)}
                           : Window{p.kernel_h * p.kernel_w, words(p.rank_in)};
}

// Outputs of a factor that are held alike. Lane packing: where half a vector or less is left, each of them
// has `group` lanes, for as many consecutive k.
struct Part {
  int64_t first, outputs;
  int group;
};

// Steps of k below which folding the lanes of a tail costs more than it saves.
constexpr int64_t kLeastFolded = 32;

// What pays: a tail beside whole vectors; half a vector and the rest where there is none, if segments end
// with both.
constexpr Part part_from(int64_t first, int64_t outputs, Window window) {
  constexpr int64_t kHalf = kLanes / 2;
  const int64_t left = outputs - first, vectors = left / kLanes * kLanes, rest = left - vectors;
#if defined(KEGFAST_AMX)
  const bool folds = outputs <= kHalf;
#else
  const bool folds = outputs <= kHalf || window.segments * window.length >= kLeastFolded;
#endif
  const int64_t most = outputs < kLanes && window.length % 2 == 0 ? kHalf + kHalf / 2 : kHalf;
  if (kLanes < 8 || rest == 0 || rest > most || !folds) return {first, left, 1};
  if (vectors > 0) return {first, vectors, 1};
  if (left > kHalf) return {first, kHalf, 2};
  if (left > kHalf / 2) return {first, left, 2};
  return {first, left, kLanes >= 16 && left <= kHalf / 4 ? 8 : 4};
}

// A packed factor: its parts one after the other, each
// [vectors of outputs][segments][length / group][kLanes].
constexpr int64_t part_floats(const Part& part, Window window) {
  return round_up(part.outputs * part.group, kLanes) * window.segments * ceil_div(window.length, part.group);
}

// f(part, offset of its packed floats) for all parts. Planes of x are read k-major, one channel at a time:
// their first factor cannot pack lanes (`folds`).
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

// One axis of one phase of an upsampling core: taps phase, phase + stride, ... make the output pixels first,
// first + stride, ... from input pixels source, source + 1, ..., the taps running against them.
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

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
