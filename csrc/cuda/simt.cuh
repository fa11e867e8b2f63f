// The only place where kernels touch the hardware.
//
// A kernel is a struct: `Params` (plain data), `kThreads`, `kBlocksPerSm`, and `static void run(const
// Params&)`. It may use the C++17 core language, <cmath>, and what this file declares. nvcc compiles the
// functions below to instructions; g++ compiles the same kernel against their twins in
// tests/emulator/simt_twins.h, where the threads of a block are fibers on one CPU thread.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KEGFAST_DEVICE __device__ __forceinline__
#define KEGFAST_ANYWHERE __host__ __device__ __forceinline__
#define KEGFAST_UNROLL _Pragma("unroll")
#define KEGFAST_ROLLED _Pragma("unroll 1")
#else
#define KEGFAST_DEVICE inline
#define KEGFAST_ANYWHERE inline
#define KEGFAST_UNROLL
#define KEGFAST_ROLLED
#endif

namespace kegfast::simt {

struct Index {
  int x, y, z;
};

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct alignas(8) Pair {
  uint32_t first, second;
};

struct alignas(16) Float4 {
  float x, y, z, w;
};

// A tensor of 16-bit elements of which bulk copies move boxes: sizes from the innermost dimension outward,
// strides in elements of the outer three. A box's rows are 64 elements.
struct TensorView {
  const void* data;
  int sizes[4];
  int64_t strides[3];
  int box[3];  // of the outer dimensions, at most 256 each
};
constexpr int kBoxRow = 128;  // bytes

// Where a byte of a box's row lies in shared memory, from the box's beginning (at a multiple of 1024): the
// same piece of eight rows is in eight different banks.
KEGFAST_ANYWHERE int in_box(int row, int byte) {
  return row * kBoxRow + (byte ^ (row % 8 * 16));
}

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

constexpr int kWarp = 32;

#ifdef __CUDACC__

KEGFAST_DEVICE int thread() {
  return threadIdx.x;
}
KEGFAST_DEVICE Index block() {
  return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
}
KEGFAST_DEVICE Index grid() {
  return {int(gridDim.x), int(gridDim.y), int(gridDim.z)};
}

KEGFAST_DEVICE char* shared() {
  extern __shared__ __align__(1024) char dynamic_shared[];
  return dynamic_shared;
}

KEGFAST_DEVICE void barrier() {
  __syncthreads();
}
KEGFAST_DEVICE void warp_barrier() {
  __syncwarp();
}
// Of a part of the block: kThreads of them, whole warps, come to the barrier `which`, 1 to 15.
template <int kThreads>
KEGFAST_DEVICE void part_barrier(int which) {
  asm volatile("barrier.sync %0, %1;" ::"r"(which), "n"(kThreads) : "memory");
}

template <class T>
KEGFAST_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(~0u, value, source_lane);
}
template <class T>
KEGFAST_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(~0u, value, distance);
}
template <class T>
KEGFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

KEGFAST_DEVICE bool any(bool mine) {  // of the warp's lanes
  return __any_sync(~0u, mine);
}

// Four (two) 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones: lane l gives the address of one 16-byte
// row.
KEGFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory without a register between; zeros where not `valid`.
KEGFAST_DEVICE void cp_async16(void* to_shared, const void* from_global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to_shared))),
      "l"(from_global), "r"(valid ? 16 : 0)
      : "memory");
}
KEGFAST_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
KEGFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- bulk copies (sm_90 and sm_100; on sm_120 they are calls of a routine): one thread asks, the copy
// engine moves a box of a tensor, zeros where the tensor is not.

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

struct alignas(64) TensorMap {  // what the driver makes of a TensorView: make_tensor_map in launch.h
  uint64_t opaque[16];
};
struct Arrival {  // in shared memory: of one load at a time
  uint64_t state;
};

KEGFAST_DEVICE void arrival_init(Arrival* arrival) {  // by one thread, before a barrier
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(arrival)))
               : "memory");
}
// Until load number `turn` of the arrival (from 0) is there.
KEGFAST_DEVICE void arrival_wait(Arrival* arrival, int turn) {
  uint32_t there = 0;
  while (there == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(there)
        : "r"(uint32_t(__cvta_generic_to_shared(arrival))), "r"(turn % 2)
        : "memory");
  }
}
// The box whose first element is at (c, x, y, n), outside of the tensor too. `bytes`: of the whole box.
KEGFAST_DEVICE void bulk_load(void* to_shared, const TensorMap& map, int c, int x, int y, int n, int bytes,
                              Arrival* arrival) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(arrival));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4, %5}], [%6];" ::"r"(uint32_t(__cvta_generic_to_shared(to_shared))),
      "l"(&map), "r"(c), "r"(x), "r"(y), "r"(n), "r"(at)
      : "memory");
}
// What this thread wrote to shared memory is the copy engine's to read, after a barrier.
KEGFAST_DEVICE void bulk_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
KEGFAST_DEVICE void bulk_store(const TensorMap& map, int c, int x, int y, int n, const void* from_shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
      "r"(c), "r"(x), "r"(y), "r"(n), "r"(uint32_t(__cvta_generic_to_shared(from_shared)))
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until what this thread's stores read may be overwritten.
KEGFAST_DEVICE void bulk_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// 16 bytes at once. The global forms say which memory is meant: the compiler cannot tell from a pointer
// inside of Params.
KEGFAST_DEVICE Words4 load_shared16(const void* shared) {
  const uint4 v = *static_cast<const uint4*>(shared);
  return {{v.x, v.y, v.z, v.w}};
}
KEGFAST_DEVICE Words4 load_global16(const void* global) {  // of what no thread of this launch writes
  const uint4 v = __ldg(static_cast<const uint4*>(global));
  return {{v.x, v.y, v.z, v.w}};
}
KEGFAST_DEVICE void store_shared16(void* shared, const Words4& v) {
  *static_cast<uint4*>(shared) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
KEGFAST_DEVICE void store_global16(void* global, const Words4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// d += a b, a 16 x k row-major fragments, b k x 8; k = 16 for 16-bit elements, 8 for tf32.
KEGFAST_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KEGFAST_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KEGFAST_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds a float to tf32 (10 explicit mantissa bits), nearest, ties away.
KEGFAST_DEVICE uint32_t round_tf32(uint32_t bits) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(bits)));
  return r;
}

// The compiler may assume nothing of x from here on: what is derived from x inside a loop is not kept in
// registers around it.
KEGFAST_DEVICE void opaque(uint32_t& x) {
  asm volatile("" : "+r"(x));
}

KEGFAST_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
KEGFAST_DEVICE float bits_float(uint32_t bits) {
  return __uint_as_float(bits);
}
KEGFAST_DEVICE float to_float(bf16 x) {
  return bits_float(uint32_t(x.bits) << 16);
}
KEGFAST_DEVICE float to_float(fp16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
template <class T>
KEGFAST_DEVICE T from_float(float x);
template <>
KEGFAST_DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
KEGFAST_DEVICE fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two numbers of 16 bits in a word, and the larger of each and 0, NaN staying NaN.
template <class T>
KEGFAST_DEVICE uint32_t pack(float low, float high);
template <>
KEGFAST_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
KEGFAST_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
KEGFAST_DEVICE uint32_t relu(uint32_t pair, bf16) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0));
  return r;
}
KEGFAST_DEVICE uint32_t relu(uint32_t pair, fp16) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0));
  return r;
}

#else  // the emulator's twins
}  // namespace kegfast::simt
#include "simt_twins.h"
namespace kegfast::simt {
#endif

KEGFAST_DEVICE float to_float(float x) {
  return x;
}
template <>
KEGFAST_DEVICE float from_float<float>(float x) {
  return x;
}

KEGFAST_DEVICE int lane() {
  return thread() % kWarp;
}
KEGFAST_DEVICE int warp() {
  return thread() / kWarp;
}

template <class T>
KEGFAST_ANYWHERE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
KEGFAST_ANYWHERE T larger(T a, T b) {
  return a < b ? b : a;
}

KEGFAST_DEVICE bool finite(float x) {
  return (float_bits(x) & 0x7f800000u) != 0x7f800000u;
}
KEGFAST_DEVICE float quiet_nan() {
  return bits_float(0x7fc00000u);
}

KEGFAST_DEVICE Float4 load_float4(const float* p) {
  const Words4 v = load_global16(p);
  return {bits_float(v.w[0]), bits_float(v.w[1]), bits_float(v.w[2]), bits_float(v.w[3])};
}

// Element i of a 16-byte vector of T.
template <class T>
KEGFAST_DEVICE float element(const Words4& v, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(v.w[i]);
  } else {
    return to_float(T{uint16_t(v.w[i / 2] >> (16 * (i % 2)))});
  }
}

// Sum over the block in a fixed order; thread 0 holds it. `scratch`: one double per warp.
template <int kThreads>
KEGFAST_DEVICE double block_sum(double value, double* scratch) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane() == 0) scratch[warp()] = value;
  barrier();
  if (thread() == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) value += scratch[w];
  }
  barrier();
  return value;
}

}  // namespace kegfast::simt
