// A frozen network as plain data: what it computes, for inputs of any size, on any machine; free of torch.
//
// Values are images (N, C, H, W), or vectors (N, C). The inputs come first, then each step adds one value.
// The file (and what Python hands over) is the same bytes: see network.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kegfast {

enum class StepKind : uint32_t {
  convolution,       // x [, addend]; weight, bias; stride, padding, dilation (two each), groups, relu,
                     // whole: the kernel is as large as x, y is (N, C)
  tucker2,           // x [, addend]; first, core, last, bias; stride, padding, dilation, relu
  conv_max_pool,     // x; weight, bias; stride, padding, pool, pool stride, pool padding, relu
  max_pool,          // x; kernel, stride, padding, dilation, ceil
  average_pool,      // x; kernel, stride, padding, ceil, count_padding, divisor (0: the window's size)
  adaptive_average,  // x; height, width
  mean,              // x (N, C, H, W) -> (N, C)
  linear,            // x (N, C) [, addend]; weight, bias; relu
  add,               // x, y; relu
  multiply,          // x, y of x's sizes or (N, C, 1, 1)
  concatenate,       // any number, along channels
  flatten,           // (N, C, H, W) -> (N, C H W)
  activation,        // x; Activation
  softmax,           // x (N, C); logarithm
  place,   // x[:, :, ::stride, ::stride] among zeros: stride (two), channels before and behind, top,
           // bottom, left, right
  affine,  // x * scale + shift by channel, relu; scale, shift
};
constexpr uint32_t kStepKinds = 16;

enum class Activation : int64_t { relu, silu, hardswish, sigmoid, tanh, hardsigmoid, relu6 };
constexpr int64_t kActivations = 7;

struct Weight {
  std::vector<int64_t> sizes;
  std::vector<float> numbers;  // none: there is no such weight (a bias)
};

struct Step {
  StepKind kind;
  std::vector<int64_t> operands;  // values
  std::vector<int64_t> options;   // as above
  std::vector<Weight> weights;
};

struct Network {
  int64_t inputs;
  std::vector<Step> steps;
  std::vector<int64_t> outputs;  // values that steps make
};

struct Shape {
  int64_t images, channels, height, width;
  bool vector;  // (N, C): height and width are 1
  int64_t image() const { return channels * height * width; }
  int64_t numbers() const { return images * image(); }
  bool operator==(const Shape&) const = default;
};

// Places of a window in an axis of such a size; 0 where it does not fit.
int64_t window_places(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                      bool ceil = false);

// Both throw std::invalid_argument, with what was expected and what came.
Network read_network(const char* bytes, size_t size);  // trusts nothing
Shape shape_of(const Step& step, const std::vector<Shape>& operands);

}  // namespace kegfast
