// tucker2 forward in bfloat16, compiled once per instruction set that multiplies pairs of them: the same
// pipeline as in float32, of words that hold two numbers (tucker2_number.inl).
//
// What it bought on the 11 layers of benchmarks/bench_tucker2.py, one core of Zen 5, whose vdpbf16ps reaches
// 530 GFLOP/s where its FMA reaches 264; best bfloat16 rival / ours at batch 1 and 8:
//   converted to float32 inside                          1.13  0.62
//   pairs, packed and multiplied as they are             1.95  1.11: 300 GFLOP/s at rank 16, 457 at rank 64
// AMX's tiles (tucker2_amx.inl) have run under emulation alone, so nothing is claimed for their speed.
#define KEGFAST_PAIRS 1
#if defined(__AMX_BF16__) || defined(KEGFAST_AMX_EMULATED)
#define KEGFAST_AMX 1
#endif
#include "cpu/tucker2_forward.inl"
#include "cpu/tucker2_pack.inl"
