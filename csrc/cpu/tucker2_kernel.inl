// Kernels of tucker2, and of what else is made of its tiles, compiled once per instruction set.
#include "cpu/conv_max_pool.inl"
#include "cpu/convolution.inl"
#include "cpu/tucker2_backward.inl"
#include "cpu/tucker2_forward.inl"
#include "cpu/tucker2_pack.inl"
