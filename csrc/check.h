// Argument checks of the operators. Errors raised inside a stable-ABI operator reach Python as RuntimeError;
// the functional layer has already turned every mistake a user can make into ValueError or TypeError, so
// these guard direct calls of torch.ops.kegfast.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define KEGFAST_CHECK(condition, name, expected, got) \
  STD_TORCH_CHECK(condition, "kegfast: ", name, " must be ", expected, ", got ", got)
