// tucker2 forward in bfloat16, compiled once per instruction set that multiplies pairs of them.
#define KEGFAST_PAIRS 1
#include "cpu/tucker2_forward.inl"
#include "cpu/tucker2_pack.inl"
