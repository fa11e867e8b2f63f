// A factor's numbers, and how they come into the packed form (tucker2_layout.inl).
#pragma once

#include "cpu/tucker2_convert.inl"
#include "cpu/tucker2_layout.inl"

namespace kegfast::KEGFAST_ISA {
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
