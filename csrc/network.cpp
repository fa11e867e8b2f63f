// Reading a network, and the shapes of its values. The bytes, all integers little-endian:
//   "KEGPLAN\0", u32 version, inputs, steps, outputs
//   for each step: u32 kind, operands, options, weights; i64 each operand and option;
//     for each weight: u32 dimensions, u32 0, i64 each size, then its float32 numbers, a multiple of 8 bytes
//   i64 each output
#include "network.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kegfast {
namespace {

constexpr char kMagic[8] = "KEGPLAN";
constexpr uint32_t kVersion = 1;
constexpr int64_t kMostSteps = 1 << 16, kMostOperands = 1 << 12, kMostSize = int64_t{1} << 31;
constexpr int64_t kMostNumbers = int64_t{1} << 36;  // of a value
constexpr int64_t kMostTaps = 256;
constexpr int64_t kMostOption = 1 << 12;

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument(what);
}
void expect(bool holds, const char* name, const std::string& expected, int64_t got) {
  if (!holds) refuse(std::string(name) + " must be " + expected + ", got " + std::to_string(got));
}

class Reader {
 public:
  Reader(const char* bytes, size_t size) : at_(bytes), left_(size) {}

  template <class T>
  T one() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  int64_t count(const char* name, int64_t least, int64_t most) {
    const int64_t n = one<uint32_t>();
    expect(n >= least && n <= most, name, "from " + std::to_string(least) + " to " + std::to_string(most), n);
    return n;
  }
  std::vector<int64_t> integers(int64_t n) {
    std::vector<int64_t> values(static_cast<size_t>(n));
    const size_t bytes = values.size() * sizeof(int64_t);
    const char* const from = take(bytes);
    if (bytes > 0) std::memcpy(values.data(), from, bytes);  // else there is no address to give
    return values;
  }
  std::vector<float> numbers(int64_t n) {
    expect(n <= static_cast<int64_t>(left_ / sizeof(float)), "a weight", "within the file", n);
    std::vector<float> values(static_cast<size_t>(n));
    const size_t bytes = values.size() * sizeof(float);
    const char* const from = take(bytes);
    if (bytes > 0) std::memcpy(values.data(), from, bytes);  // else there is no address to give
    take((8 - bytes % 8) % 8);
    return values;
  }
  const char* take(size_t bytes) {
    expect(bytes <= left_, "the file", "as long as it says; bytes missing",
           static_cast<int64_t>(bytes - left_));
    const char* const here = at_;
    at_ += bytes, left_ -= bytes;
    return here;
  }
  size_t left() const { return left_; }

 private:
  const char* at_;
  size_t left_;
};

Weight read_weight(Reader& reader) {
  Weight weight;
  const int64_t dimensions = reader.count("dimensions of a weight", 1, 4);
  reader.one<uint32_t>();
  weight.sizes = reader.integers(dimensions);
  int64_t numbers = 1;
  for (const int64_t size : weight.sizes) {
    expect(size >= 0 && size < kMostSize, "a weight's size", "from 0 to 2^31", size);
    numbers = size == 0 || numbers <= kMostNumbers / size ? numbers * size : kMostNumbers;
  }
  weight.numbers = reader.numbers(numbers);
  return weight;
}

struct Form {  // how many of each a kind of step has
  int64_t least_operands, most_operands, options, weights;
};
constexpr Form kForms[kStepKinds] = {
    {1, 2, 9, 2},
    {1, 2, 7, 4},
    {1, 1, 11, 2},
    {1, 1, 9, 0},
    {1, 1, 9, 0},
    {1, 1, 2, 0},
    {1, 1, 0, 0},
    {1, 2, 1, 2},
    {2, 2, 1, 0},
    {2, 2, 0, 0},
    {1, kMostOperands, 0, 0},
    {1, 1, 0, 0},
    {1, 1, 1, 0},
    {1, 1, 1, 0},
    {1, 1, 8, 0},
    {1, 1, 1, 2},
};

void expect_weight(const Weight& w, size_t dimensions) {
  expect(w.sizes.size() == dimensions && !w.numbers.empty(), "a weight",
         "of " + std::to_string(dimensions) + " dimensions and not empty",
         static_cast<int64_t>(w.sizes.size()));
}
void expect_bias(const Weight& bias, int64_t features) {
  const auto n = static_cast<int64_t>(bias.numbers.size());
  expect(n == 0 || (n == features && bias.sizes.size() == 1), "a bias", "of one number per feature, or empty",
         n);
}
void expect_taps(const Weight& w) {
  expect(w.sizes[2] <= kMostTaps && w.sizes[3] <= kMostTaps && w.sizes[2] * w.sizes[3] <= kMostTaps,
         "a kernel", "of at most 256 taps", w.sizes[2] * w.sizes[3]);
}
void expect_positive(const Step& step, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i)
    expect(step.options[i] >= 1, "an option", "at least 1", step.options[i]);
}

void check_weights(const Step& step) {
  const auto& w = step.weights;
  switch (step.kind) {
    case StepKind::convolution:
    case StepKind::conv_max_pool:
      expect_weight(w[0], 4), expect_taps(w[0]), expect_bias(w[1], w[0].sizes[0]);
      break;
    case StepKind::tucker2: {
      expect_weight(w[0], 4), expect_weight(w[1], 4), expect_weight(w[2], 4), expect_taps(w[1]);
      const bool chain = w[0].sizes[0] == w[1].sizes[1] && w[1].sizes[0] == w[2].sizes[1];
      expect(chain && w[0].sizes[2] * w[0].sizes[3] * w[2].sizes[2] * w[2].sizes[3] == 1, "factors",
             "(R1, C, 1, 1), (R2, R1, h, w), (K, R2, 1, 1)", w[1].sizes[0]);
      expect_bias(w[3], w[2].sizes[0]);
      break;
    }
    case StepKind::linear:
      expect_weight(w[0], 2), expect_bias(w[1], w[0].sizes[0]);
      break;
    case StepKind::affine:
      expect_weight(w[0], 1), expect_weight(w[1], 1);
      expect(w[0].sizes == w[1].sizes, "a shift", "of the scale's size", w[1].sizes[0]);
      break;
    default:
      break;
  }
}

// Options of a step that are sizes and strides, at least 1.
constexpr struct {
  StepKind kind;
  size_t first, end;
} kPositive[] = {
    {StepKind::convolution, 0, 2},      {StepKind::convolution, 4, 7},   {StepKind::tucker2, 0, 2},
    {StepKind::tucker2, 4, 6},          {StepKind::conv_max_pool, 0, 2}, {StepKind::conv_max_pool, 4, 8},
    {StepKind::max_pool, 0, 4},         {StepKind::max_pool, 6, 8},      {StepKind::average_pool, 0, 4},
    {StepKind::adaptive_average, 0, 2}, {StepKind::place, 0, 2},
};

void check_options(const Step& step) {
  for (const int64_t option : step.options)
    expect(option >= 0 && option <= kMostOption, "an option", "from 0 to 2^12", option);
  for (const auto& [kind, first, end] : kPositive)
    if (kind == step.kind) expect_positive(step, first, end);
  if (step.kind == StepKind::activation)
    expect(step.options[0] < kActivations, "an activation", "one of those known", step.options[0]);
}

Step read_step(Reader& reader, int64_t values) {
  Step step;
  const int64_t kind = reader.count("a step's kind", 0, kStepKinds - 1);
  const Form& form = kForms[kind];
  step.kind = static_cast<StepKind>(kind);
  const int64_t operands = reader.count("a step's operands", form.least_operands, form.most_operands);
  const int64_t options = reader.count("a step's options", form.options, form.options);
  const int64_t weights = reader.count("a step's weights", form.weights, form.weights);
  step.operands = reader.integers(operands);
  step.options = reader.integers(options);
  for (const int64_t operand : step.operands)
    expect(operand >= 0 && operand < values, "an operand", "a value made before", operand);
  for (int64_t i = 0; i < weights; ++i) step.weights.push_back(read_weight(reader));
  check_options(step), check_weights(step);
  return step;
}

void expect_images(const Shape& x) {
  expect(!x.vector, "x", "of shape (N, C, H, W)", 2);
}

Shape convolved(const Shape& x, int64_t features, int64_t kernel_h, int64_t kernel_w, const int64_t* options,
                int64_t dilation_h, int64_t dilation_w) {
  expect_images(x);
  const Shape y{x.images, features, window_places(x.height, kernel_h, options[0], options[2], dilation_h),
                window_places(x.width, kernel_w, options[1], options[3], dilation_w), false};
  expect(y.height > 0 && y.width > 0, "x", "at least as large as the window", std::min(x.height, x.width));
  return y;
}

Shape pooled(const Shape& x, const Step& step, int64_t dilation_h, int64_t dilation_w, bool ceil) {
  expect_images(x);
  const auto& o = step.options;
  expect(2 * o[4] <= o[0] && 2 * o[5] <= o[1], "a pool's padding", "at most half of its window",
         std::max(o[4], o[5]));
  const Shape y{x.images, x.channels, window_places(x.height, o[0], o[2], o[4], dilation_h, ceil),
                window_places(x.width, o[1], o[3], o[5], dilation_w, ceil), false};
  expect(y.height > 0 && y.width > 0, "x", "at least as large as the window", std::min(x.height, x.width));
  return y;
}

void expect_addend(const Step& step, const std::vector<Shape>& operands, const Shape& y) {
  if (step.operands.size() == 2)
    expect(operands[1] == y, "an addend", "of the output's shape", operands[1].channels);
}

}  // namespace

int64_t window_places(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                      bool ceil) {
  const int64_t reach = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (reach < 0) return 0;
  int64_t places = (reach + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (places - 1) * stride >= size + padding) --places;  // it would start behind the image
  return places;
}

Network read_network(const char* bytes, size_t size) {
  Reader reader(bytes, size);
  if (std::memcmp(reader.take(sizeof kMagic), kMagic, sizeof kMagic) != 0)
    refuse("the file must be a frozen network of kegfast (KEGPLAN), got something else");
  const auto version = reader.one<uint32_t>();
  expect(version == kVersion, "the file's version", std::to_string(kVersion), version);
  Network network;
  network.inputs = reader.count("inputs", 1, kMostOperands);
  const int64_t steps = reader.count("steps", 1, kMostSteps);
  const int64_t outputs = reader.count("outputs", 1, kMostOperands);
  for (int64_t i = 0; i < steps; ++i) network.steps.push_back(read_step(reader, network.inputs + i));
  network.outputs = reader.integers(outputs);
  for (const int64_t output : network.outputs)
    expect(output >= network.inputs && output < network.inputs + steps, "an output",
           "a value that a step makes", output);
  auto distinct = network.outputs;
  std::sort(distinct.begin(), distinct.end());
  expect(std::adjacent_find(distinct.begin(), distinct.end()) == distinct.end(), "outputs", "distinct values",
         outputs);
  expect(reader.left() == 0, "the file", "as long as it says; bytes too many",
         static_cast<int64_t>(reader.left()));
  return network;
}

Shape shape_of(const Step& step, const std::vector<Shape>& operands) {
  const Shape& x = operands[0];
  const auto& o = step.options;
  const auto& w = step.weights;
  for (const Shape& operand : operands)
    expect(operand.images == x.images, "operands", "as many images in each", operand.images);
  const auto finished = [&]() -> Shape {
    switch (step.kind) {
      case StepKind::convolution: {
        const int64_t groups = o[6], features = w[0].sizes[0];
        expect(features % groups == 0 && x.channels == groups * w[0].sizes[1], "x's channels",
               "those of the weight", x.channels);
        Shape y = convolved(x, features, w[0].sizes[2], w[0].sizes[3], o.data(), o[4], o[5]);
        y.vector = o[8];
        expect(!y.vector || (y.height == 1 && y.width == 1), "x", "of the size of the weight's window",
               x.height);
        expect_addend(step, operands, y);
        return y;
      }
      case StepKind::tucker2: {
        expect(x.channels == w[0].sizes[1], "x's channels", "those of the first factor", x.channels);
        const Shape y = convolved(x, w[2].sizes[0], w[1].sizes[2], w[1].sizes[3], o.data(), o[4], o[5]);
        expect_addend(step, operands, y);
        return y;
      }
      case StepKind::conv_max_pool: {
        expect(x.channels == w[0].sizes[1], "x's channels", "those of the weight", x.channels);
        const Shape z = convolved(x, w[0].sizes[0], w[0].sizes[2], w[0].sizes[3], o.data(), 1, 1);
        const Step pool{StepKind::max_pool, {}, {o[4], o[5], o[6], o[7], o[8], o[9]}, {}};
        return pooled(z, pool, 1, 1, false);
      }
      case StepKind::max_pool:
        return pooled(x, step, o[6], o[7], o[8]);
      case StepKind::average_pool:
        return pooled(x, step, 1, 1, o[6]);
      case StepKind::adaptive_average:
        expect_images(x);
        return {x.images, x.channels, o[0], o[1], false};
      case StepKind::mean:
        expect_images(x);
        return {x.images, x.channels, 1, 1, true};
      case StepKind::linear: {
        expect(x.vector, "x", "of shape (N, C)", 4);
        expect(x.channels == w[0].sizes[1], "x's features", "those of the weight", x.channels);
        const Shape y{x.images, w[0].sizes[0], 1, 1, true};
        expect_addend(step, operands, y);
        return y;
      }
      case StepKind::add:
        expect(operands[1] == x, "y", "of x's shape", operands[1].channels);
        return x;
      case StepKind::multiply: {
        Shape scale = x;
        scale.height = scale.width = 1;
        expect(operands[1] == x || operands[1] == scale, "y", "of x's shape, or (N, C, 1, 1)",
               operands[1].channels);
        return x;
      }
      case StepKind::concatenate: {
        Shape y = x;
        y.channels = 0;
        for (const Shape& operand : operands) {
          expect(operand.height == x.height && operand.width == x.width && operand.vector == x.vector,
                 "operands", "of one size", operand.height);
          y.channels += operand.channels;
        }
        return y;
      }
      case StepKind::flatten:
        return {x.images, x.image(), 1, 1, true};
      case StepKind::activation:
        return x;
      case StepKind::softmax:
        expect(x.vector, "x", "of shape (N, C)", 4);
        return x;
      case StepKind::place:
        expect_images(x);
        return {x.images, x.channels + o[2] + o[3], (x.height - 1) / o[0] + 1 + o[4] + o[5],
                (x.width - 1) / o[1] + 1 + o[6] + o[7], false};
      case StepKind::affine:
        expect(x.channels == w[0].sizes[0], "x's channels", "those of the scale", x.channels);
        return x;
    }
    refuse("a step must be of a known kind");
  };
  const Shape y = finished();
  for (const int64_t size : {y.channels, y.height, y.width})
    expect(size > 0 && size < kMostSize, "a value's size", "from 1 to 2^31", size);
  expect(y.channels <= kMostNumbers / y.height / y.width / std::max<int64_t>(1, y.images), "a value",
         "of at most 2^36 numbers", y.channels);
  return y;
}

}  // namespace kegfast
