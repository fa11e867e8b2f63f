// Sorting a tile: every lane (feature) sorts its own batch, all lanes at once, by a network of vector minima
// and maxima.
//
// A key is 32 bits: the value as a fixed-point number between the lane's minimum and maximum, then the row.
// 32-bit lanes are twice as many as 64-bit ones and their minima issue twice as fast as doubles'. What the
// fixed-point numbers cannot tell apart (a few pairs per thousand features at B = 256) is put in order
// afterwards, by the values themselves.
//
// The network's first 16 vectors are an unrolled list of exchanges, which stay in registers; merges take 16
// vectors at a time, so that a merge of 256 reads and writes them twice.
// Log: docs/kernels/log.md.
#pragma once

#include <utility>

#include "cpu/diversity_tile.inl"

namespace kegfast::KEGFAST_ISA {

using Keys = Vec<uint32_t>;
constexpr int L = lanes<float>;

inline Keys kmin(Keys a, Keys b) {
#if defined(__AVX512F__)
  return (Keys)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Keys)_mm256_min_epu32((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
  return (Keys)vminq_u32((uint32x4_t)a, (uint32x4_t)b);
#else
  return a < b ? a : b;
#endif
}
inline Keys kmax(Keys a, Keys b) {
#if defined(__AVX512F__)
  return (Keys)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Keys)_mm256_max_epu32((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
  return (Keys)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b);
#else
  return a < b ? b : a;
#endif
}

inline void exchange(Keys& a, Keys& b) {
  const Keys low = kmin(a, b);
  b = kmax(a, b);
  a = low;
}

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kLevels = 4;  // 16 vectors at a time in 32 registers
#else
constexpr int kLevels = 3;
#endif

// Half-cleaners of strides N/2 ... 1 on N vectors in registers.
template <int N>
inline __attribute__((always_inline)) void clean(Keys* v) {
#pragma GCC unroll 16
  for (int stride = N / 2; stride; stride /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & stride)) exchange(v[i], v[i + stride]);
}

// One pass over `n` vectors of blocks of `block`, N vectors `block / N` apart at a time; with `flip` it is
// the first pass of a merge of two sorted halves, whose second half is read backwards.
template <int N, bool flip>
inline void merge_pass(Keys* k, int64_t n, int64_t block) {
  const int64_t step = block / N;
  for (int64_t base = 0; base < n; base += block)
    for (int64_t r = 0; r < step; ++r) {
      Keys v[N];
      Keys* low = k + base + r;
      Keys* high = flip ? k + base + (step - 1 - r) : low;
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) v[t] = (t < N / 2 ? low : high)[t * step];
      if (flip) {
#pragma GCC unroll 8
        for (int t = 0; t < N / 2; ++t) exchange(v[t], v[N - 1 - t]);
        clean<N / 2>(v);
        clean<N / 2>(v + N / 2);
      } else {
        clean<N>(v);
      }
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) (t < N / 2 ? low : high)[t * step] = v[t];
    }
}

// Batcher's odd-even merge sort of N, as a list of exchanges that the compiler can unroll.
template <int N>
struct Batcher {
  int first[N * 8] = {}, second[N * 8] = {}, size = 0;

  constexpr Batcher() {
    for (int p = 1; p < N; p *= 2)
      for (int q = p; q; q /= 2)
        for (int j = q % p; j + q < N; j += 2 * q)
          for (int i = 0; i < q && i + j + q < N; ++i)
            if ((i + j) / (2 * p) == (i + j + q) / (2 * p)) first[size] = i + j, second[size++] = i + j + q;
  }
};

template <int N, int... step>
inline __attribute__((always_inline)) void sort_in_registers(Keys* v, std::integer_sequence<int, step...>) {
  constexpr Batcher<N> network;
  (exchange(v[network.first[step]], v[network.second[step]]), ...);
}

template <int N>
inline void sort_registers(Keys* k, int64_t n) {
  constexpr Batcher<N> network;
  for (int64_t base = 0; base < n; base += N) {
    Keys v[N];
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) v[t] = k[base + t];
    sort_in_registers<N>(v, std::make_integer_sequence<int, network.size>{});
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) k[base + t] = v[t];
  }
}

inline void clean_passes(Keys* k, int64_t n, int64_t block) {
  while (block > 1 << kLevels) {
    // The last pass takes a full set of levels, the one before what is left.
    int64_t levels = 0;
    while ((int64_t{1} << levels) < block) ++levels;
    const int64_t first = levels % kLevels ? levels % kLevels : kLevels;
    if (first == 1)
      merge_pass<2, false>(k, n, block);
    else if (first == 2)
      merge_pass<4, false>(k, n, block);
    else if (first == 3)
      merge_pass<8, false>(k, n, block);
    else
      merge_pass<1 << kLevels, false>(k, n, block);
    block >>= first;
  }
  if (block == 2)
    merge_pass<2, false>(k, n, 2);
  else if (block == 4)
    merge_pass<4, false>(k, n, 4);
  else if (block == 8)
    merge_pass<8, false>(k, n, 8);
  else if (block == 16)
    merge_pass<1 << kLevels, false>(k, n, 16);
}

// Sorts each lane of k[0..n), n a power of two and at least 16: parts that stay in the first cache one after
// another, then merges of those, whose passes are finished part by part as well.
inline void sort_network(Keys* k, int64_t n) {
  constexpr int N = 1 << kLevels;
  constexpr int64_t kPart = 256;
  const int64_t part = n < kPart ? n : kPart;
  for (Keys* at = k; at != k + n; at += part) {
    sort_registers<N>(at, part);
    for (int64_t block = 2 * N; block <= part; block *= 2) {
      merge_pass<N, true>(at, part, block);
      clean_passes(at, part, block / N);
    }
  }
  for (int64_t block = 2 * part; block <= n; block *= 2) {
    merge_pass<N, true>(k, n, block);
    for (Keys* at = k; at != k + n; at += block / N) clean_passes(at, block / N, block / N);
  }
}

struct Run {
  int32_t lane, begin, end;  // positions begin..end of the lane hold equal values
};

// Restores the order by value of keys[begin..end) of one lane, whose fixed-point numbers are equal.
inline void order_run(uint32_t* keys, const float* x, uint32_t row_mask, int32_t begin, int32_t end) {
  const auto value = [&](uint32_t key) { return x[int64_t{key & row_mask} * L]; };
  int64_t moves = 0;
  for (int32_t i = begin + 1; i < end; ++i) {
    const uint32_t key = keys[i * int64_t{L}];
    const float v = value(key);
    int32_t j = i;
    for (; j > begin && value(keys[(j - 1) * int64_t{L}]) > v; --j)
      keys[j * int64_t{L}] = keys[(j - 1) * int64_t{L}];
    keys[j * int64_t{L}] = key;
    moves += i - j;
    if (moves > 16 * int64_t{end - begin}) break;
  }
  if (moves <= 16 * int64_t{end - begin}) return;
  // Heap sort: an outlier has squeezed the rest of the lane into one number.
  const int32_t count = end - begin;
  uint32_t* heap = keys + begin * int64_t{L};
  const auto sift = [&](int32_t root, int32_t size) {
    for (int32_t child; (child = 2 * root + 1) < size; root = child) {
      if (child + 1 < size && value(heap[child * L]) < value(heap[(child + 1) * L])) ++child;
      if (!(value(heap[root * L]) < value(heap[child * L]))) return;
      const uint32_t moved = heap[root * L];
      heap[root * L] = heap[child * L];
      heap[child * L] = moved;
    }
  };
  for (int32_t root = count / 2; root-- > 0;) sift(root, count);
  for (int32_t size = count; size-- > 1;) {
    const uint32_t top = heap[0];
    heap[0] = heap[size * L];
    heap[size * L] = top;
    sift(0, size);
  }
}

inline uint32_t lanes_below(Keys a, uint32_t bound) {  // bit l: a[l] < bound
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask((__m512i)a, _mm512_set1_epi32(static_cast<int>(bound)));
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a < bound));
#elif defined(__ARM_NEON)
  return vaddvq_u32((uint32x4_t)((Keys)(a < bound) & Keys{1, 2, 4, 8}));
#else
  uint32_t mask = 0;
  for (int l = 0; l < L; ++l) mask |= static_cast<uint32_t>(a[l] < bound) << l;
  return mask;
#endif
}

inline int64_t padded_batch(int64_t batch) {
  int64_t n = 16;
  while (n < batch) n *= 2;
  return n;
}

inline int bits_for(int64_t batch) {
  int bits = 0;
  while ((int64_t{1} << bits) < batch) ++bits;
  return bits;
}

inline uint32_t constant_lanes(const Tile<float>& t) {
  uint32_t constant = 0;
  for (int l = 0; l < L; ++l) constant |= static_cast<uint32_t>(t.low[l] == t.high[l]) << l;
  return constant;
}

inline Keys varying_lanes(uint32_t constant) {
  Keys varies;
  for (int l = 0; l < L; ++l) varies[l] = constant >> l & 1 ? 0u : ~0u;
  return varies;
}

// Fills keys [padded_batch, L] with fixed-point keys and sorts them; rows stand in the low bits.
inline void sort_keys(const Tile<float>& t, int64_t batch, uint32_t* keys) {
  const int row_bits = bits_for(batch);
  const float top =
      static_cast<float>((uint64_t{1} << (32 - row_bits)) - (uint64_t{1} << (32 - row_bits)) / 0x100000 - 1);
  const Vec<float> range = t.high - t.low, limit = splat(top);
  const Vec<float> scale = vmin(limit / vmax(range, splat(0x1p-90f)), splat(0x1p120f));
  const Keys bias = Keys{} + 0x80000000u;
  const Vec<float> shift = splat(0x1p31f);
  for (int64_t i = 0; i < batch; ++i) {
    const Vec<float> unit = vmin((load(t.x + i * L) - t.low) * scale, limit);
    Keys number;
    if (row_bits == 0) {
      number = Keys{};
    } else {
      (void)bias, (void)shift;
      number = (Keys) __builtin_convertvector(unit, Vec<int32_t>);
    }
    store(keys + i * L, (number << row_bits) | static_cast<uint32_t>(i));
  }
  const int64_t n = padded_batch(batch);
  for (int64_t i = batch; i < n; ++i) store(keys + i * L, ~Keys{});
  sort_network(reinterpret_cast<Keys*>(keys), n);
}

// Puts what the keys could not tell apart in order and lists the runs of equal values of all lanes but the
// constant ones.
inline int64_t settle(const Tile<float>& t, int64_t batch, uint32_t* keys, uint32_t constant, Run* ties) {
  const int row_bits = bits_for(batch);
  const uint32_t row_mask = (uint32_t{1} << row_bits) - 1, bound = row_mask + 1;
  const uint32_t wanted = ((uint64_t{1} << L) - 1) & ~constant;
  int64_t runs = 0;
  uint32_t before = 0;  // lanes that are inside a run
  const auto same_number = [&](int64_t i) __attribute__((always_inline)) {
    return lanes_below(load(keys + i * L) ^ load(keys + (i + 1) * L), bound) & wanted;
  };
  const auto visit = [&](int64_t i, uint32_t same) {
    for (uint32_t starts = same & ~before; starts; starts &= starts - 1) {
      const int lane = __builtin_ctz(starts);
      uint32_t* column = keys + lane;
      int64_t end = i + 2;
      while (end < batch && (column[end * L] ^ column[i * L]) < bound) ++end;
      order_run(column, t.x + lane, row_mask, i, end);
      const auto value = [&](int64_t position) {
        return t.x[int64_t{column[position * L] & row_mask} * L + lane];
      };
      for (int64_t begin = i; begin < end;) {
        int64_t next = begin + 1;
        while (next < end && value(next) == value(begin)) ++next;
        if (next - begin > 1) ties[runs++] = {lane, static_cast<int32_t>(begin), static_cast<int32_t>(next)};
        begin = next;
      }
    }
    before = same;
  };
  int64_t i = 0;
  for (; i + 4 < batch; i += 4) {  // one question for four positions: the answer is nearly always no
    uint32_t same[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) same[k] = same_number(i + k);
    if (same[0] | same[1] | same[2] | same[3])
      for (int k = 0; k < 4; ++k) visit(i + k, same[k]);
    else
      before = 0;
  }
  for (; i + 1 < batch; ++i) visit(i, same_number(i));
  return runs;
}

}  // namespace kegfast::KEGFAST_ISA
