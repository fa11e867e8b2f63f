// What a tensor was when a call was settled.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace kegfast {

// Python names tensors by the address of their implementation (`_cdata`), which is all that an at::Tensor
// holds: a cell with it is one that counts no reference.
inline AtenTensorHandle handle_of(void** implementation) {
  return reinterpret_cast<AtenTensorHandle>(implementation);
}
// A reference of its own.
inline torch::stable::Tensor tensor_of(void* implementation) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_of(&implementation), &made));
  return torch::stable::Tensor(made);
}

class SeenTensor {
 public:
  // Of a dense strided tensor.
  explicit SeenTensor(void* implementation) : implementation_(implementation) {
    const AtenTensorHandle t = handle_of(&implementation);
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
    view_.assign(sizes, sizes + dim);
    view_.insert(view_.end(), strides, strides + dim);
    int64_t last = 0;
    bool empty = false;
    for (int64_t i = 0; i < dim; ++i) last += (sizes[i] - 1) * strides[i], empty |= sizes[i] == 0;
    bytes_ = empty ? 0 : (last + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(type_));
    data_ = numbers(implementation);
  }

  void* implementation() const { return implementation_; }
  const void* numbers() const { return data_; }  // of it unchanged
  int64_t bytes() const { return bytes_; }       // from its first number to its last, with what lies between

  // The tensor itself, alive: it may look at other memory, or otherwise.
  bool unchanged() const { return looks_like(implementation_) && numbers(implementation_) == data_; }

  // Another tensor, alive: on the CPU, of this one's type, sizes and strides, with all of its numbers in
  // memory.
  bool looks_like(void* implementation) const {
    const AtenTensorHandle t = handle_of(&implementation);
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr, kept = 0, offset = 0;
    int32_t type = 0, device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device));
    if (2 * dim != static_cast<int64_t>(view_.size()) || type != type_ ||
        device != aoti_torch_device_type_cpu())
      return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t, &kept));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t, &offset));
    const auto number = static_cast<int64_t>(aoti_torch_dtype_element_size(type));
    return std::equal(sizes, sizes + dim, view_.begin()) &&
           std::equal(strides, strides + dim, view_.begin() + dim) && offset * number + bytes_ <= kept;
  }

  // Of a tensor, alive and in memory.
  static const void* numbers(void* implementation) {
    const void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_of(&implementation), &data));
    return data;
  }

 private:
  void* implementation_;
  const void* data_;
  int32_t type_ = 0;
  int64_t bytes_ = 0;
  std::vector<int64_t> view_;  // sizes, then strides
};

// Whether `copy`, alive, holds the bytes of `of`, alive: both strided.
inline bool same_bytes(const SeenTensor& of, void* copy) {
  return of.unchanged() && of.looks_like(copy) &&
         std::memcmp(of.numbers(), SeenTensor::numbers(copy), static_cast<size_t>(of.bytes())) == 0;
}

}  // namespace kegfast
