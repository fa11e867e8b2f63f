// Kernels of tucker2, compiled once per instruction set.
#include "cpu/tucker2_backward.inl"
#include "cpu/tucker2_forward.inl"
#include "cpu/tucker2_pack.inl"
