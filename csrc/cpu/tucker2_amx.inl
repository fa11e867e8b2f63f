// Tiles of AMX under tucker2's pairs: up to 32 pixels x 32 outputs in four registers of 16 x 16 sums, 16
// words of k a step. The registers are reached through five calls alone: intrinsics or, with
// KEGFAST_AMX_EMULATED, plain C++, so that the tests of any machine run every other line.
#pragma once

#include "cpu/tucker2_tile.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

constexpr int kSide = 16;  // rows of a register and words of a row
constexpr int64_t kSideBytes = 4 * kSide;

#if defined(KEGFAST_AMX_EMULATED)
// Registers 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights.
thread_local uint32_t amx_registers[8][kSide][kSide];

struct AmxSession {};

inline void amx_zero() {
  memset(amx_registers, 0, 4 * sizeof amx_registers[0]);
}
inline void amx_read(int to, const void* from, int64_t stride) {
  for (int i = 0; i < kSide; ++i)
    memcpy(amx_registers[to][i], static_cast<const char*>(from) + i * stride, kSideBytes);
}
template <int I>
void amx_pixels(const void* from, int64_t stride) {
  amx_read(4 + I, from, stride);
}
template <int I>
void amx_weights(const void* from, int64_t stride) {
  amx_read(6 + I, from, stride);
}
template <int P, int V>
void amx_multiply() {
  auto& sums = amx_registers[2 * P + V];
  for (int m = 0; m < kSide; ++m)
    for (int n = 0; n < kSide; ++n) {
      float sum = bits_to_float(sums[m][n]);
      for (int k = 0; k < kSide; ++k) {
        const uint32_t a = amx_registers[4 + P][m][k], b = amx_registers[6 + V][k][n];
        sum += bits_to_float(a << 16) * bits_to_float(b << 16);
        sum += bits_to_float(a & 0xffff0000u) * bits_to_float(b & 0xffff0000u);
      }
      memcpy(&sums[m][n], &sum, 4);
    }
}
template <int I>
void amx_sums(float* to) {
  memcpy(to, amx_registers[I], sizeof amx_registers[I]);
}
#else
// A thread's registers, for as long as it computes.
class AmxSession {
 public:
  AmxSession() {
    alignas(64) uint8_t config[64] = {1};  // palette
    for (int t = 0; t < 8; ++t) {
      const uint16_t bytes = kSideBytes;
      memcpy(config + 16 + 2 * t, &bytes, 2);
      config[48 + t] = kSide;
    }
    asm volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~AmxSession() { _tile_release(); }
};

KEGFAST_INLINE void amx_zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// GCC's load does not say that it reads memory.
KEGFAST_INLINE void amx_see_memory() {
  asm volatile("" ::: "memory");
}
template <int I>
KEGFAST_INLINE void amx_pixels(const void* from, int64_t stride) {
  amx_see_memory();
  if constexpr (I == 0)
    _tile_loadd(4, from, stride);
  else
    _tile_loadd(5, from, stride);
}
template <int I>
KEGFAST_INLINE void amx_weights(const void* from, int64_t stride) {
  amx_see_memory();
  if constexpr (I == 0)
    _tile_loadd(6, from, stride);
  else
    _tile_loadd(7, from, stride);
}
template <int P, int V>
KEGFAST_INLINE void amx_multiply() {
  if constexpr (P == 0 && V == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (P == 0 && V == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (P == 1 && V == 0) _tile_dpbf16ps(2, 5, 6);
  if constexpr (P == 1 && V == 1) _tile_dpbf16ps(3, 5, 7);
}
template <int I>
KEGFAST_INLINE void amx_sums(float* to) {
  if constexpr (I == 0) _tile_stored(0, to, kSideBytes);
  if constexpr (I == 1) _tile_stored(1, to, kSideBytes);
  if constexpr (I == 2) _tile_stored(2, to, kSideBytes);
  if constexpr (I == 3) _tile_stored(3, to, kSideBytes);
}
#endif

// The n < kSide words of each row, and so many rows of weights, that a segment ends with; zeros behind them.
struct AmxRest {
  alignas(64) float words[kSide][kSide] = {};
};
inline void take_pixels(AmxRest& rest, const float* from, int64_t step, int64_t n) {
  for (int i = 0; i < kSide; ++i)
    memcpy(rest.words[i], from + i * step, static_cast<size_t>(n) * sizeof(float));
}
inline void take_weights(AmxRest& rest, const float* from, int64_t n) {
  memcpy(rest.words, from, static_cast<size_t>(n) * kSideBytes);
}

template <int P, int V>
void finish_amx(const Tile& t) {
  constexpr int kPixelTile = P - 1, kVector = V - 1;
  alignas(64) float sums[kSide * kSide];
  amx_sums<2 * kPixelTile + kVector>(sums);
  Floats acc[kSide][1];
  for (int j = 0; j < kSide; ++j) acc[j][0] = load_unaligned(sums + j * kSide);
  store_tile<kSide, 1, 1, Bias::per_lane>(t, acc);
}

// A tile of 16 Pixels x Vectors, as run_tile of so many.
template <int Pixels, int Vectors>
void run_amx(const Tile& t) {
  amx_zero();
  const int64_t stride = t.a_step * static_cast<int64_t>(sizeof(float));
  const float* b = t.b;
  for (int64_t s = 0; s < t.segment_count; ++s, b += t.segment_length * kLanes) {
    if (t.prefetcher) t.prefetcher->step();
    const float* const a = t.a + t.segments[s];
    const float* const a1 = a + kSide * t.a_step;
    const float* const b1 = b + t.b_vector;
    int64_t k = 0;
    for (; k + kSide <= t.segment_length; k += kSide) {
      amx_pixels<0>(a + k, stride);
      amx_weights<0>(b + k * kLanes, kSideBytes);
      amx_multiply<0, 0>();
      if constexpr (Pixels > 1) amx_pixels<1>(a1 + k, stride), amx_multiply<1, 0>();
      if constexpr (Vectors > 1) amx_weights<1>(b1 + k * kLanes, kSideBytes), amx_multiply<0, 1>();
      if constexpr (Pixels > 1 && Vectors > 1) amx_multiply<1, 1>();
    }
    const int64_t rest = t.segment_length - k;
    if (rest == 0) continue;
    AmxRest words[4];
    take_pixels(words[0], a + k, t.a_step, rest);
    take_weights(words[2], b + k * kLanes, rest);
    amx_pixels<0>(words[0].words, kSideBytes);
    amx_weights<0>(words[2].words, kSideBytes);
    amx_multiply<0, 0>();
    if constexpr (Pixels > 1) {
      take_pixels(words[1], a1 + k, t.a_step, rest);
      amx_pixels<1>(words[1].words, kSideBytes);
      amx_multiply<1, 0>();
    }
    if constexpr (Vectors > 1) {
      take_weights(words[3], b1 + k * kLanes, rest);
      amx_weights<1>(words[3].words, kSideBytes);
      amx_multiply<0, 1>();
    }
    if constexpr (Pixels > 1 && Vectors > 1) amx_multiply<1, 1>();
  }
  const auto part = [&](int pixel_tile, int vector) {
    Tile one = t;
    one.c += pixel_tile * kSide * t.c_step + vector * kLanes;
    if (one.bias) one.bias += vector * kLanes;
    one.tail = vector + 1 < Vectors ? kLanes : t.tail;
    return one;
  };
  finish_amx<1, 1>(part(0, 0));
  if constexpr (Vectors > 1) finish_amx<1, 2>(part(0, 1));
  if constexpr (Pixels > 1) finish_amx<2, 1>(part(1, 0));
  if constexpr (Pixels > 1 && Vectors > 1) finish_amx<2, 2>(part(1, 1));
}

// As many of a row's pixels as fill whole registers, for `vectors` vectors of outputs; how many they were.
inline int64_t run_amx_row(const Tile& t, int vectors, int64_t pixels) {
  const int64_t tiles = pixels / kSide;
  for (int64_t p = 0; p < tiles; p += 2)
    for (int v = 0; v < vectors; v += 2) {
      const bool two_pixels = p + 1 < tiles, two_vectors = v + 1 < vectors;
      Tile part = t;
      part.a += p * kSide * t.a_step;
      part.b += v * t.b_vector;
      part.c += p * kSide * t.c_step + v * kLanes;
      if (part.bias) part.bias += v * kLanes;
      if (v + 2 < vectors) part.tail = kLanes;
      if (two_pixels)
        two_vectors ? run_amx<2, 2>(part) : run_amx<2, 1>(part);
      else
        two_vectors ? run_amx<1, 2>(part) : run_amx<1, 1>(part);
    }
  return tiles * kSide;
}

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
