// The micro-kernel under every stage of tucker2: a tile of Pixels x Vectors accumulators that never leave the
// registers.
//
//   C[j, :] (+)= sum over segments s and k < length of A(s, k, j) * B[s * length + k, :]
//
// A is read one word at a time and broadcast, B by whole vectors of words, zero-padded (tucker2_number.inl: a
// word is a float or a pair of bfloat16, and k, segments and steps of A and B count words; C counts numbers).
// The stages are GEMMs over pixels (j) in which the core's kh x kw window is kh segments of kw * R1
// contiguous floats.
#pragma once

#include "cpu/tucker2_number.inl"
#include "cpu/tucker2_prefetch.inl"

namespace kegfast::KEGFAST_ISA {
namespace {

struct Tile {
  const float* a;
  int64_t a_step;           // floats from one j (row-major A) or one k (k-major A) to the next
  const int64_t* segments;  // offsets from a, in floats
  int64_t segment_count, segment_length;
  const float* b;
  int64_t b_vector;  // floats from one vector to the next
  Number* c;
  int64_t c_step;
  const float* bias;  // added where not null: per lane (channels in lanes) or per j
  int tail;           // lanes of the last vector that exist
  bool accumulate, relu, stream;
  int64_t addend;  // where to accumulate: numbers from c to those that the sums are added to, 0: c's own
  Prefetcher* prefetcher;  // or null
  int64_t taps;            // 3 or 5: a segment is so many runs of a_step words; else 0
};

enum class ALayout { row_major, k_major };  // k_major: A(s, k, j) at a + segment + k * a_step + j
enum class Bias { per_lane, per_row };

// Register budget: Pixels * Vectors accumulators, one B vector per column, one broadcast.
constexpr int kMaxVectors = kRegisters == 32 ? 4 : 3;
constexpr int kMaxPixels = kRegisters == 32 ? 18 : 10;  // base pointers of more would not stay in registers
constexpr int max_pixels(int vectors) {
  const int free = (kRegisters - 1 - vectors) / vectors;
  return free < kMaxPixels ? free : kMaxPixels;
}

// Group > 1 (lane packing, for ranks below a vector): one vector holds Group consecutive k of kLanes / Group
// channels, lane c * Group + g for channel c and k = g; the groups are summed once, at the end.
template <int Group>
KEGFAST_INLINE Floats splat_group(const float* p) {
#if defined(__AVX512F__)
  if constexpr (Group == 2) {
    double pair;
    memcpy(&pair, p, sizeof pair);
    return (Floats)_mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  if constexpr (Group == 4) return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
  if constexpr (Group == 8) return (Floats)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  if constexpr (Group == 2) {
    double pair;
    memcpy(&pair, p, sizeof pair);
    return (Floats)_mm256_set1_pd(pair);
  }
  if constexpr (Group == 4) return (Floats)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  return splat_word(p);
}

// The n < Group values that a segment ends with; what lies behind them is never read.
template <int Group>
KEGFAST_INLINE Floats splat_rest(const float* p, int n) {
#if defined(__AVX512F__)
  const __mmask8 mask = static_cast<__mmask8>((1u << n) - 1);
  if constexpr (Group == 2) return (Floats)_mm512_broadcast_f32x2(_mm_maskz_loadu_ps(mask, p));
  if constexpr (Group == 4) return (Floats)_mm512_broadcast_f32x4(_mm_maskz_loadu_ps(mask, p));
  if constexpr (Group == 8) return (Floats)_mm512_broadcast_f32x8(_mm256_maskz_loadu_ps(mask, p));
#elif defined(__AVX2__)
  if constexpr (Group > 1) {
    const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(n), _mm_setr_epi32(0, 1, 2, 3));
    const __m128 values = _mm_maskload_ps(p, mask);
    if constexpr (Group == 2) return (Floats)_mm256_broadcastsd_pd(_mm_castps_pd(values));
    return (Floats)_mm256_set_m128(values, values);
  }
#endif
  (void)n;
  return splat_word(p);
}

template <int Step>
KEGFAST_INLINE Floats add_swapped(Floats v) {
  return v + shuffle(v, [](int l) { return l ^ Step; });
}

template <int Group>
KEGFAST_INLINE Floats fold_groups(Floats v) {
  if constexpr (Group >= 2) v = add_swapped<1>(v);
  if constexpr (Group >= 4) v = add_swapped<2>(v);
  if constexpr (Group >= 8) v = add_swapped<4>(v);
  return shuffle(v, [](int l) { return (l * Group) % kLanes; });
}

// What happens to a sum on its way to memory. The common cases are compiled apart: choosing anew in every
// store cost a tile as much as 12 steps of k.
enum class Finish { store, add, bias, bias_relu, add_bias_relu, any };

template <int Pixels, int Vectors, int Group, Bias kBias, Finish kFinish>
KEGFAST_INLINE void finish_tile(const Tile& t, const Floats (&acc)[Pixels][Vectors]) {
  constexpr bool kAny = kFinish == Finish::any;
  constexpr int kWhole = kLanes / Group;
  constexpr bool kAll = kFinish == Finish::add_bias_relu;
  const bool add = kAny ? t.accumulate : kFinish == Finish::add || kAll;
  const bool with_bias =
      kAny ? t.bias != nullptr : kFinish == Finish::bias || kFinish == Finish::bias_relu || kAll;
  const bool with_relu = kAny ? t.relu : kFinish == Finish::bias_relu || kAll;
  Number* const c = t.c;
  const int64_t step = t.c_step, addend = t.addend;
  Floats bias[Vectors] = {};
  if (kBias == Bias::per_lane && with_bias) {
    KEGFAST_UNROLL
    for (int v = 0; v < Vectors; ++v)
      bias[v] = load_first(t.bias + v * kLanes, kAny && v == Vectors - 1 ? t.tail : kWhole);
  }
  KEGFAST_UNROLL
  for (int j = 0; j < Pixels; ++j) {
    KEGFAST_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      Number* const to = c + j * step + v * kLanes;
      const int n = kAny && v == Vectors - 1 ? t.tail : kWhole;
      Floats x = acc[j][v];
      if (add) x += load_numbers(to + addend, n);
      if (with_bias) x += kBias == Bias::per_lane ? bias[v] : splat(t.bias[j]);
      if (with_relu) x = relu(x);
      if (kAny && t.stream && n == kLanes)
        stream_numbers(to, x);
      else
        store_numbers(to, x, n);
    }
  }
}

template <int Pixels, int Vectors, int Group, Bias kBias>
KEGFAST_INLINE void store_tile(const Tile& t, const Floats (&acc)[Pixels][Vectors]) {
  const bool all = t.accumulate && t.bias && t.relu;
  const bool any = t.tail < kLanes / Group || t.stream || (t.accumulate && (t.bias || t.relu) && !all) ||
                   (t.relu && !t.bias);
  if (any) return finish_tile<Pixels, Vectors, Group, kBias, Finish::any>(t, acc);
  if (all) return finish_tile<Pixels, Vectors, Group, kBias, Finish::add_bias_relu>(t, acc);
  if (t.accumulate) return finish_tile<Pixels, Vectors, Group, kBias, Finish::add>(t, acc);
  if (t.relu) return finish_tile<Pixels, Vectors, Group, kBias, Finish::bias_relu>(t, acc);
  if (t.bias) return finish_tile<Pixels, Vectors, Group, kBias, Finish::bias>(t, acc);
  finish_tile<Pixels, Vectors, Group, kBias, Finish::store>(t, acc);
}

// One vector of the sums of Group pixels, each of kLanes / Group channels.
template <int Group>
KEGFAST_INLINE Floats fold_pixels(const Floats (*acc)[1]) {
  if constexpr (Group == 1) {
    return acc[0][0];
  } else {
    const Floats a = fold_pixels<Group / 2>(acc), b = fold_pixels<Group / 2>(acc + Group / 2);
    return shuffle(a, b, [](int l) { return 2 * l; }) + shuffle(a, b, [](int l) { return 2 * l + 1; });
  }
}

// Folds what lanes hold apart and stores it; where pixels follow each other, several make up a whole vector.
template <int Pixels, int Vectors, int Group, Bias kBias>
KEGFAST_INLINE void finish(const Tile& t, Floats (&acc)[Pixels][Vectors]) {
  if constexpr (Group > 1) {
    constexpr int kWhole = kLanes / Group, kTogether = Pixels / Group * Group;
    if (t.c_step == kWhole && t.tail == kWhole && !t.accumulate && !t.bias && !t.relu) {
      KEGFAST_UNROLL
      for (int j = 0; j < kTogether; j += Group)
        store_numbers(t.c + j * kWhole, fold_pixels<Group>(acc + j), kLanes);
      KEGFAST_UNROLL
      for (int j = kTogether; j < Pixels; ++j)
        store_numbers(t.c + j * kWhole, fold_groups<Group>(acc[j][0]), kWhole);
      return;
    }
    KEGFAST_UNROLL
    for (int j = 0; j < Pixels; ++j) acc[j][0] = fold_groups<Group>(acc[j][0]);
  }
  store_tile<Pixels, Vectors, Group, kBias>(t, acc);
}

// sum += x * w, in the register of the sum: of a loop that is unrolled, GCC would else move sums among all 16
// and spill.
KEGFAST_INLINE void add_product(Floats& sum, Floats x, Floats w) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(KEGFAST_PAIRS)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#else
  sum = multiply_add(x, w, sum);
#endif
}

// Steps of k that the loop takes at once: with 12 products or less in each, its own instructions would be a
// fifth.
constexpr int unrolled(ALayout a, int group) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return a == ALayout::row_major && group == 1 ? 4 : 1;
#else
  (void)a, (void)group;
  return 1;
#endif
}

template <int Pixels, int Vectors, ALayout kA, int Group, Bias kBias>
void run_tile(const Tile& t) {
  static_assert(Group == 1 || (Vectors == 1 && kA == ALayout::row_major));
  constexpr int kBases =
      kA == ALayout::row_major ? (Pixels + 2) / 3 : 1;  // x86 addresses base + {0, 1, 2} * step
  constexpr int kUnrolled = unrolled(kA, Group);
  Floats acc[Pixels][Vectors] = {};
  const int64_t a_step = t.a_step, b_vector = t.b_vector;
  const float* b = t.b;
  const float* base[kBases];
  const auto take = [&](auto steps) __attribute__((always_inline)) {
    constexpr int kSteps = decltype(steps)::value;
    KEGFAST_UNROLL
    for (int u = 0; u < kSteps; ++u) {
      Floats w[Vectors];
      KEGFAST_UNROLL
      for (int v = 0; v < Vectors; ++v) w[v] = load_unaligned(b + v * b_vector + u * kLanes);
      KEGFAST_UNROLL
      for (int j = 0; j < Pixels; ++j) {
        const float* const at = kA == ALayout::row_major ? base[j / 3] + (j % 3) * a_step : base[0] + j;
        const Floats x = splat_group<Group>(at + u * (kA == ALayout::row_major ? Group : a_step));
        KEGFAST_UNROLL
        for (int v = 0; v < Vectors; ++v) add_product(acc[j][v], x, w[v]);
      }
    }
    b += kSteps * kLanes;
    KEGFAST_UNROLL
    for (int i = 0; i < kBases; ++i) {
      base[i] += kSteps * (kA == ALayout::row_major ? Group : a_step);
      asm("" : "+r"(base[i]));  // keeps one pointer per three pixels instead of one each
    }
  };
  for (int64_t s = 0; s < t.segment_count; ++s) {
    KEGFAST_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = t.a + t.segments[s] + 3 * i * a_step;
    for (int64_t left = t.segment_length; left >= Group;) {
      const int64_t part = t.prefetcher && left > kPrefetchSteps * Group ? kPrefetchSteps * Group : left;
      if (t.prefetcher) t.prefetcher->step();
      left -= part;
      int64_t k = part;
      if constexpr (kUnrolled > 1)
        for (; k >= kUnrolled * Group; k -= kUnrolled * Group) take(std::integral_constant<int, kUnrolled>{});
      for (; k >= Group; k -= Group) take(std::integral_constant<int, 1>{});
    }
    const int rest = Group > 1 ? static_cast<int>(t.segment_length % Group) : 0;
    if (Group > 1 && rest) {
      if (t.prefetcher && t.segment_length < Group) t.prefetcher->step();
      const Floats w = load_unaligned(b);
      KEGFAST_UNROLL
      for (int j = 0; j < Pixels; ++j)
        acc[j][0] = multiply_add(
            splat_rest<Group>(base[kA == ALayout::row_major ? j / 3 : 0] + (j % 3) * a_step, rest), w,
            acc[j][0]);
      b += kLanes;
    }
  }
  finish<Pixels, Vectors, Group, kBias>(t, acc);
}

// Taps of a row that lie a pixel apart (stride and dilation 1): a word of A is broadcast once for all of
// them. A tile of one vector, which would read a word for each product, is then no longer bound by its loads.
// Segments are Taps runs of a_step words, a multiple of Group.
template <int Pixels, int Taps, int Group, Bias kBias>
void run_taps(const Tile& t) {
  constexpr int kWords = Pixels + Taps - 1, kBases = (kWords + 2) / 3;
  Floats acc[Pixels][1] = {};
  const int64_t a_step = t.a_step, tap = a_step / Group * kLanes;
  const float* b = t.b;
  for (int64_t s = 0; s < t.segment_count; ++s, b += (Taps - 1) * tap) {
    const float* base[kBases];
    KEGFAST_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = t.a + t.segments[s] + 3 * i * a_step;
    for (int64_t left = a_step; left > 0;) {
      const int64_t part =
          t.prefetcher && left > kTapPrefetchSteps * Group ? kTapPrefetchSteps * Group : left;
      if (t.prefetcher) t.prefetcher->step();
      left -= part;
      for (int64_t k = part; k > 0; k -= Group, b += kLanes) {
        Floats w[Taps];
        KEGFAST_UNROLL
        for (int i = 0; i < Taps; ++i) w[i] = load_unaligned(b + i * tap);
        KEGFAST_UNROLL
        for (int j = 0; j < kWords; ++j) {
          const Floats x = splat_group<Group>(base[j / 3] + (j % 3) * a_step);
          KEGFAST_UNROLL
          for (int i = 0; i < Taps; ++i)
            if (0 <= j - i && j - i < Pixels) acc[j - i][0] = multiply_add(x, w[i], acc[j - i][0]);
        }
        KEGFAST_UNROLL
        for (int i = 0; i < kBases; ++i) {
          base[i] += Group;
          asm("" : "+r"(base[i]));
        }
      }
    }
  }
  finish<Pixels, 1, Group, kBias>(t, acc);
}

using TileFunction = void (*)(const Tile&);

template <ALayout kA, int Group, Bias kBias>
struct TileTable {
  TileFunction f[kMaxVectors + 1][kMaxPixels + 1] = {};
  template <int Vectors, int Pixels>
  constexpr void fill() {
    if constexpr (Vectors <= (Group > 1 ? 1 : kMaxVectors)) {
      if constexpr (Pixels <= max_pixels(Vectors)) {
        f[Vectors][Pixels] = &run_tile<Pixels, Vectors, kA, Group, kBias>;
        fill<Vectors, Pixels + 1>();
      } else {
        fill<Vectors + 1, 1>();
      }
    }
  }
  constexpr TileTable() { fill<1, 1>(); }
};

template <int Taps, int Group>
struct TapTable {
  TileFunction f[kMaxPixels + 1] = {};
  template <int Pixels>
  constexpr void fill() {
    if constexpr (Pixels <= kMaxPixels) {
      f[Pixels] = &run_taps<Pixels, Taps, Group, Bias::per_lane>;
      fill<Pixels + 1>();
    }
  }
  constexpr TapTable() { fill<1>(); }
};

}  // namespace
}  // namespace kegfast::KEGFAST_ISA
