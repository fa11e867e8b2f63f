// The twins of csrc/cuda/simt.cuh's hardware functions on the fiber emulator. Included by simt.cuh when g++
// compiles it.
#pragma once

#include <cstring>
#include <stdexcept>

#include "fibers.h"

namespace kegfast::simt {

namespace em = kegfast::emulator;

inline int thread() {
  return em::here().thread;
}
inline Index block() {
  return {em::here().block[0], em::here().block[1], em::here().block[2]};
}
inline Index grid() {
  return {em::here().grid[0], em::here().grid[1], em::here().grid[2]};
}
inline char* shared() {
  return em::here().shared;
}
inline void barrier() {
  em::block_barrier();
}
inline void warp_barrier() {
  em::warp_exchange("warp_barrier", nullptr, 0);
}

template <int kThreads>
void part_barrier(int which) {
  em::part_barrier(which, kThreads);
}

template <class T>
T read_lane(const char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + lane * em::kSlot, sizeof value);
  return value;
}

template <class T>
T shuffle(T value, int source_lane) {
  return read_lane<T>(em::warp_exchange("shuffle", &value, sizeof value), source_lane % kWarp);
}
template <class T>
T shuffle_up(T value, int distance) {
  const int source = thread() % kWarp - distance;
  const char* slots = em::warp_exchange("shuffle_up", &value, sizeof value);
  return source < 0 ? value : read_lane<T>(slots, source);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return read_lane<T>(em::warp_exchange("shuffle_xor", &value, sizeof value), (thread() % kWarp) ^ mask);
}

inline bool any(bool mine) {
  const char* slots = em::warp_exchange("any", &mine, sizeof mine);
  bool found = false;
  for (int l = 0; l < kWarp; ++l) found |= read_lane<bool>(slots, l);
  return found;
}

inline void combine_ldmatrix(char* slots) {
  const char* rows[kWarp];
  for (int l = 0; l < kWarp; ++l) rows[l] = read_lane<const char*>(slots, l);
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i)
      std::memcpy(slots + l * em::kSlot + 4 * i, rows[8 * i + l / 4] + 4 * (l % 4), 4);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  em::require_aligned(row, 16, "ldmatrix");
  const char* slots = em::warp_exchange("ldmatrix_x4", &row, sizeof row, combine_ldmatrix);
  std::memcpy(r, slots + thread() % kWarp * em::kSlot, sizeof r);
}

inline void cp_async16(void* to_shared, const void* from_global, bool valid) {
  em::require_aligned(to_shared, 16, "cp.async to");
  em::require_aligned(from_global, 16, "cp.async from");
  em::async_copy16(to_shared, from_global, valid);
}
inline void cp_async_commit() {
  em::async_commit();
}
template <int kPending>
void cp_async_wait() {
  em::async_wait(kPending);
}

constexpr bool kBulkCopies = true;
struct TensorMap {
  TensorView view;
};
struct Arrival {
  uint64_t state;
};

inline TensorMap make_tensor_map(const TensorView& view) {
  em::require_aligned(view.data, 16, "bulk copies of a tensor");
  int64_t inner = 8;
  for (int64_t stride : view.strides) {
    if (stride < inner || stride % inner != 0 || 2 * stride >= int64_t(1) << 40)
      throw std::runtime_error(
          "bulk copies want strides of whole 16 bytes, each a multiple of the one before");
    inner = stride;
  }
  for (int size : view.sizes) {
    if (size < 1) throw std::runtime_error("bulk copies of nothing");
  }
  for (int size : view.box) {
    if (size < 1 || size > 256) throw std::runtime_error("a box that bulk copies have not");
  }
  return {view};
}
inline void arrival_init(Arrival* arrival) {
  em::arrival_init(arrival);
}
inline void arrival_wait(Arrival* arrival, int turn) {
  em::arrival_wait(arrival, turn);
}
inline void bulk_fence() {
  em::bulk_fence();
}
inline void bulk_store_wait() {
  em::bulk_store_wait();
}

// each(place in the box, element of the tensor, or null outside of it)
template <class Each>
void for_box(const TensorView& v, int c, int x, int y, int n, Each each) {
  const auto inside = [&v](int at, int dim) { return at >= 0 && at < v.sizes[dim]; };
  int row = 0;
  for (int k = n; k < n + v.box[2]; ++k) {
    for (int j = y; j < y + v.box[1]; ++j) {
      for (int i = x; i < x + v.box[0]; ++i, ++row) {
        for (int e = 0; e < kBoxRow / 2; ++e) {
          const bool there = inside(c + e, 0) && inside(i, 1) && inside(j, 2) && inside(k, 3);
          const int64_t at = c + e + i * v.strides[0] + j * v.strides[1] + k * v.strides[2];
          each(in_box(row, 2 * e), there ? static_cast<const char*>(v.data) + 2 * at : nullptr);
        }
      }
    }
  }
}

inline void bulk_load(void* to_shared, const TensorMap& map, int c, int x, int y, int n, int bytes,
                      Arrival* arrival) {
  const TensorView& v = map.view;
  if (bytes != v.box[0] * v.box[1] * v.box[2] * kBoxRow)
    throw std::runtime_error("a bulk load of other bytes than its box has");
  em::bulk_load(arrival, static_cast<char*>(to_shared), bytes, [v, c, x, y, n](char* to) {
    for_box(v, c, x, y, n, [to](int at, const char* from) {
      if (from == nullptr) {
        std::memset(to + at, 0, 2);
      } else {
        std::memcpy(to + at, from, 2);
      }
    });
  });
}
inline void bulk_store(const TensorMap& map, int c, int x, int y, int n, const void* from_shared) {
  const TensorView& v = map.view;
  em::bulk_store(static_cast<const char*>(from_shared), [v, c, x, y, n](const char* from) {
    for_box(v, c, x, y, n, [from](int at, const char* to) {
      if (to != nullptr) std::memcpy(const_cast<char*>(to), from + at, 2);
    });
  });
}

inline Words4 load_shared16(const void* shared) {
  em::require_aligned(shared, 16, "16-byte load");
  Words4 v;
  std::memcpy(&v, shared, 16);
  return v;
}
inline Words4 load_global16(const void* global) {
  return load_shared16(global);
}
inline void store_shared16(void* shared, const Words4& v) {
  em::require_aligned(shared, 16, "16-byte store");
  std::memcpy(shared, &v, 16);
}
inline void store_global16(void* global, const Words4& v) {
  store_shared16(global, v);
}

inline void opaque(uint32_t&) {}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float to_float(bf16 x) {
  return bits_float(uint32_t(x.bits) << 16);
}
inline float to_float(fp16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return float(h);
}
template <class T>
T from_float(float x);
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  fp16 r;
  std::memcpy(&r.bits, &h, 2);
  return r;
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
uint32_t relu(uint32_t pair, T) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const uint16_t bits = uint16_t(pair >> (16 * half));
    const float value = to_float(T{bits});
    if (value > 0 || value != value) result |= uint32_t(bits) << (16 * half);
  }
  return result;
}

inline uint32_t round_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

// One lane's part of an mma: fragments in, accumulators in and out.
struct MmaLane {
  uint32_t a[4], b[2];
  float d[4];
};

template <class T>
float mma_operand(uint32_t word, int half) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(word & 0xffffe000u);  // the unit ignores the low 13 bits
  } else {
    return to_float(T{uint16_t(word >> (16 * half))});
  }
}

// What a tensor core makes of an accumulator and a step's products: no addend keeps what lies below the last
// bit of the largest, and the sum is cut, not rounded, to a float. (Later units keep a bit or two more.)
template <int kCount>
float truncating_sum(const double (&addends)[kCount]) {
  double most = 0, plain = 0;
  for (double v : addends) plain += v, most = std::fabs(v) > most ? std::fabs(v) : most;
  if (most == 0 || plain - plain != 0) return float(plain);
  const double unit = std::ldexp(1.0, std::ilogb(most) - 23), per_unit = 1 / unit;
  double sum = 0;
  for (double v : addends) sum += double(int64_t(v * per_unit));
  sum *= unit;
  const float rounded = float(sum);
  return std::fabs(double(rounded)) > std::fabs(sum) ? std::nextafterf(rounded, 0) : rounded;
}

template <class T>
void combine_mma(char* slots) {
  constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
  float a[16][kDepth], b[8][kDepth];
  MmaLane lanes[kWarp];
  for (int l = 0; l < kWarp; ++l) {
    lanes[l] = read_lane<MmaLane>(slots, l);
    const int row = l / 4, word = l % 4;
    for (int h = 0; h < kPerWord; ++h) {
      const int k = word * kPerWord + h;
      for (int i = 0; i < 4; ++i) {
        a[row + 8 * (i % 2)][k + 4 * kPerWord * (i / 2)] = mma_operand<T>(lanes[l].a[i], h);
      }
      for (int i = 0; i < 2; ++i) b[row][k + 4 * kPerWord * i] = mma_operand<T>(lanes[l].b[i], h);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double addends[kDepth + 1];
      for (int k = 0; k < kDepth; ++k) addends[k] = double(a[row][k]) * b[column][k];
      addends[kDepth] = lanes[l].d[i];
      lanes[l].d[i] = truncating_sum(addends);
    }
    std::memcpy(slots + l * em::kSlot, &lanes[l], sizeof lanes[l]);
  }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  MmaLane mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  std::memcpy(mine.d, d, sizeof d);
  const char* slots = em::warp_exchange("mma", &mine, sizeof mine, combine_mma<T>);
  mine = read_lane<MmaLane>(slots, thread() % kWarp);
  std::memcpy(d, mine.d, sizeof d);
}

}  // namespace kegfast::simt
