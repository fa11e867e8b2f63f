// tucker2's bfloat16 kernels with AMX's registers in plain C++ (csrc/cpu/tucker2_amx.inl), for
// tests/ops/test_tucker2_amx.py.
#define KEGFAST_ISA amx
#define KEGFAST_HAS_AVX512_BF16 1
#define KEGFAST_HAS_AMX 1
#define KEGFAST_AMX_EMULATED 1
#include <cstdlib>

#include "cpu/tucker2_bf16_kernel.inl"

namespace {

struct Call {
  const uint16_t *x, *first, *core, *last;  // dense; x as pixels of channels where channels_last
  const float* bias;
  const uint16_t* addend;  // as y, or null
  uint16_t* y;
  int64_t images, channels, height, width, rank_in, rank_out, features, kernel_h, kernel_w;
  int64_t stride, padding, dilation, channels_last, relu;
};

kegfast::Tucker2Factor factor(const uint16_t* data, int64_t outputs, int64_t inputs, int64_t h, int64_t w) {
  return {data, kegfast::Tucker2Type::bfloat16, inputs * h * w, h * w, w, 1, outputs, inputs};
}

}  // namespace

extern "C" void amx_forward(const Call* call) {
  using namespace kegfast;
  const Call& c = *call;
  Tucker2Params p{};
  p.images = c.images, p.channels = c.channels, p.height = c.height, p.width = c.width;
  p.features = c.features, p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w;
  p.rank_in = c.rank_in + c.rank_in % 2, p.rank_out = c.rank_out + c.rank_out % 2;
  p.stride_h = p.stride_w = c.stride, p.padding_h = p.padding_w = c.padding;
  p.dilation_h = p.dilation_w = c.dilation;
  p.out_height = (c.height + 2 * c.padding - c.dilation * (c.kernel_h - 1) - 1) / c.stride + 1;
  p.out_width = (c.width + 2 * c.padding - c.dilation * (c.kernel_w - 1) - 1) / c.stride + 1;
  p.channels_last = c.channels_last, p.relu = c.relu, p.pairs = true;
  p.type = Tucker2Type::bfloat16;
  p.x = c.x, p.y = c.y, p.bias = c.bias, p.addend = c.addend;
  p.x_image = c.channels * c.height * c.width;
  p.x_channel = c.channels_last ? 1 : c.height * c.width;
  p.x_pixel = c.channels_last ? c.channels : 1;
  p.x_row = p.x_pixel * c.width;
  const Tucker2Plan plan = amx::tucker2_plan(p, 1);
  const auto floats = [](int64_t n) {
    return static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(n * 4 + 63) / 64 * 64));
  };
  float *const packed = floats(plan.packed_floats), *const scratch = floats(plan.scratch_floats);
  amx::tucker2_pack(p, plan, factor(c.first, c.rank_in, c.channels, 1, 1),
                    factor(c.core, c.rank_out, c.rank_in, c.kernel_h, c.kernel_w),
                    factor(c.last, c.features, c.rank_out, 1, 1), false, packed);
  p.packed = packed;
  amx::tucker2_rows(p, plan, 0, p.images * p.out_height, scratch);
  std::free(packed), std::free(scratch);
}
