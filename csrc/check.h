// Argument checks of the operators. Errors raised inside a stable-ABI operator reach Python as RuntimeError;
// the functional layer has already turned every mistake a user can make into ValueError or TypeError, so
// these guard direct calls of torch.ops.kegfast.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define KEGFAST_CHECK(condition, name, expected, got) \
  STD_TORCH_CHECK(condition, "kegfast: ", name, " must be ", expected, ", got ", got)

namespace kegfast {

// Torch keeps the sizes of a tensor whose storage was resized below them, or that never had one.
inline void check_in_memory(const char* name, const torch::stable::Tensor& t) {
  int64_t last = 0, kept = 0, offset = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return;
    last += (t.size(i) - 1) * t.stride(i);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &kept));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  const auto number = static_cast<int64_t>(t.element_size());
  KEGFAST_CHECK((offset + last + 1) * number <= kept && t.const_data_ptr() != nullptr, name,
                "a tensor whose numbers are in memory", kept);
}

}  // namespace kegfast
