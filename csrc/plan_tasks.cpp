// The tasks that a plan consists of: what each kind of step runs.
#include <algorithm>
#include <functional>
#include <stdexcept>

#include "conv_max_pool.h"
#include "convolution.h"
#include "plan.h"
#include "tucker2.h"

namespace kegfast {
namespace {

constexpr int64_t kNumberWork = 8;  // multiply-adds that take as long as moving a number

Tucker2Factor factor_of(const Weight& w) {
  const auto& s = w.sizes;
  return {w.numbers.data(), Tucker2Type::float32, s[1] * s[2] * s[3], s[2] * s[3], s[3], 1, s[0], s[1]};
}
const float* bias_of(const Weight& w) {
  return w.numbers.empty() ? nullptr : w.numbers.data();
}

class ConvolutionTask final : public Task {
 public:
  ConvolutionTask(const ConvolutionParams& p, const Weight& weight, const Weight& bias, int64_t threads)
      : p_(p),
        plan_(KEGFAST_SELECT(convolution_plan)(p, threads)),
        bias_(bias_of(bias)),
        kernel_(KEGFAST_SELECT(convolution_units)) {
    units = plan_.units;
    work = p.out_height * p.out_width * (p.kernel_h * p.kernel_w * (p.channels / p.groups) * p.features);
    scratch_floats = plan_.scratch_floats;
    packed_floats = plan_.packed_floats;
    form = static_cast<int64_t>(plan_.form);
    if (plan_.form == ConvolutionForm::pointwise)
      form = static_cast<int64_t>(ConvolutionForm::direct);  // alike
    pack = [p, plan = plan_, from = weight.numbers.data(), f = KEGFAST_SELECT(convolution_pack)](float* to) {
      f(p, plan, from, to);
    };
    adds_ = false;
  }
  void with_addend() { adds_ = true; }
  void run(const TaskCall& call, int64_t begin, int64_t end) const override {
    kernel_(p_, plan_, {call.operands[0], packed, bias_, adds_ ? call.operands[1] : nullptr, call.y}, begin,
            end, call.scratch);
  }

 private:
  const ConvolutionParams p_;
  const ConvolutionPlan plan_;
  const float* const bias_;
  bool adds_;
  decltype(KEGFAST_SELECT(convolution_units)) const kernel_;
};

std::unique_ptr<Task> convolution(const Step& step, const std::vector<Input>& operands, const Shape& y,
                                  int64_t threads) {
  const Input& x = operands[0];
  ConvolutionParams p{};
  p.images = x.shape.images, p.channels = x.shape.channels, p.height = x.shape.height,
  p.width = x.shape.width;
  p.features = y.channels, p.out_height = y.height, p.out_width = y.width;
  p.x_image = x.strides.image, p.x_channel = x.strides.channel, p.x_row = x.strides.row,
  p.x_pixel = x.strides.pixel;
  p.groups = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.kernel_h = p.kernel_w = 1;
  p.winograd = 2;
  const auto& o = step.options;
  if (step.kind == StepKind::convolution) {
    p.kernel_h = step.weights[0].sizes[2], p.kernel_w = step.weights[0].sizes[3];
    p.stride_h = o[0], p.stride_w = o[1], p.padding_h = o[2], p.padding_w = o[3];
    p.dilation_h = o[4], p.dilation_w = o[5], p.groups = o[6], p.relu = o[7];
  } else {  // of images of one pixel, which may as well be the pixels of one image
    p.relu = o[0];
  }
  auto task = std::make_unique<ConvolutionTask>(p, step.weights[0], step.weights[1], threads);
  if (operands.size() == 2) task->with_addend();
  return task;
}

class Tucker2Task final : public Task {
 public:
  Tucker2Task(const Step& step, const std::vector<Input>& operands, const Shape& y, int64_t threads)
      : kernel_(KEGFAST_SELECT(tucker2_rows)) {
    const Weight &first = step.weights[0], &core = step.weights[1], &last = step.weights[2];
    const Shape& x = operands[0].shape;
    const auto& o = step.options;
    p_.images = x.images, p_.channels = x.channels, p_.height = x.height, p_.width = x.width;
    p_.rank_in = first.sizes[0], p_.rank_out = core.sizes[0], p_.features = y.channels;
    p_.out_height = y.height, p_.out_width = y.width;
    p_.kernel_h = core.sizes[2], p_.kernel_w = core.sizes[3];
    p_.stride_h = o[0], p_.stride_w = o[1], p_.padding_h = o[2], p_.padding_w = o[3];
    p_.dilation_h = o[4], p_.dilation_w = o[5], p_.relu = o[6];
    p_.channels_last = true;
    p_.winograd = 2;
    p_.type = Tucker2Type::float32;
    const Strides& s = operands[0].strides;
    p_.x_image = s.image, p_.x_channel = s.channel, p_.x_row = s.row, p_.x_pixel = s.pixel;
    p_.bias = bias_of(step.weights[3]);
    adds_ = operands.size() == 2;
    plan_ = KEGFAST_SELECT(tucker2_plan)(p_, threads);
    units = p_.out_height;
    work =
        p_.height * p_.width * p_.channels * p_.rank_in +
        p_.out_height * p_.out_width * p_.rank_out * (p_.rank_in * p_.kernel_h * p_.kernel_w + p_.features);
    scratch_floats = plan_.scratch_floats;
    packed_floats = plan_.packed_floats;
    form = plan_.winograd;
    pack = [this, f = factor_of(first), c = factor_of(core), l = factor_of(last)](float* to) {
      KEGFAST_SELECT(tucker2_pack)(p_, plan_, f, c, l, false, to);
    };
  }
  void run(const TaskCall& call, int64_t begin, int64_t end) const override {
    Tucker2Params p = p_;
    p.x = call.operands[0], p.packed = packed, p.y = call.y;
    p.addend = adds_ ? call.operands[1] : nullptr;
    kernel_(p, plan_, begin, end, call.scratch);
  }

 private:
  Tucker2Params p_{};
  Tucker2Plan plan_{};
  bool adds_ = false;
  decltype(KEGFAST_SELECT(tucker2_rows)) const kernel_;
};

class ConvMaxPoolTask final : public Task {
 public:
  ConvMaxPoolTask(const Step& step, const Input& x, const Shape& y)
      : kernel_(KEGFAST_SELECT(conv_max_pool_rows)) {
    const auto& o = step.options;
    const auto& w = step.weights[0].sizes;
    p_.images = x.shape.images, p_.channels = x.shape.channels, p_.height = x.shape.height,
    p_.width = x.shape.width;
    p_.features = y.channels;
    p_.conv = {w[2], w[3], o[0], o[1], o[2], o[3]};
    p_.pool = {o[4], o[5], o[6], o[7], o[8], o[9]};
    p_.relu = o[10], p_.channels_last = true;
    p_.x_image = x.strides.image, p_.x_channel = x.strides.channel;
    p_.x_row = x.strides.row, p_.x_pixel = x.strides.pixel;
    p_.bias = bias_of(step.weights[1]);
    plan_ = KEGFAST_SELECT(conv_max_pool_plan)(p_);
    units = y.height;
    work = p_.conv.rows(p_.height) * p_.conv.columns(p_.width) * p_.features * p_.channels * w[2] * w[3];
    scratch_floats = plan_.scratch_floats;
    packed_floats = plan_.packed_floats;
    pack = [this, weight = factor_of(step.weights[0])](float* to) {
      KEGFAST_SELECT(conv_max_pool_pack)(p_, weight, to);
    };
  }
  void run(const TaskCall& call, int64_t begin, int64_t end) const override {
    ConvMaxPoolParams p = p_;
    p.x = call.operands[0], p.packed = packed, p.y = call.y;
    kernel_(p, plan_, begin, end, call.scratch);
  }

 private:
  ConvMaxPoolParams p_{};
  ConvMaxPoolPlan plan_{};
  decltype(KEGFAST_SELECT(conv_max_pool_rows)) const kernel_;
};

// A task that is a function of where its values lie and of its units.
class FunctionTask final : public Task {
 public:
  using Function = std::function<void(const TaskCall&, int64_t begin, int64_t end)>;
  FunctionTask(int64_t rows, int64_t cost, Function function) : function_(std::move(function)) {
    units = rows, work = cost;
  }
  void run(const TaskCall& call, int64_t begin, int64_t end) const override { function_(call, begin, end); }

 private:
  const Function function_;
};
std::unique_ptr<Task> function_task(int64_t units, int64_t work, FunctionTask::Function function) {
  return std::make_unique<FunctionTask>(units, work, std::move(function));
}

std::unique_ptr<Task> pool(const Step& step, const Shape& x, const Shape& y) {
  const auto& o = step.options;
  PoolParams p{};
  p.channels = x.channels, p.height = x.height, p.width = x.width, p.out_height = y.height,
  p.out_width = y.width;
  p.dilation_h = p.dilation_w = 1;
  p.kind = PoolParams::Kind::adaptive;
  if (step.kind == StepKind::max_pool || step.kind == StepKind::average_pool) {
    p.kernel_h = o[0], p.kernel_w = o[1], p.stride_h = o[2], p.stride_w = o[3], p.padding_h = o[4],
    p.padding_w = o[5];
    p.kind = PoolParams::Kind::average;
    if (step.kind == StepKind::max_pool)
      p.kind = PoolParams::Kind::maximum, p.dilation_h = o[6], p.dilation_w = o[7];
    else
      p.count_padding = o[7], p.divisor = o[8];
  }
  const int64_t window = p.kind == PoolParams::Kind::adaptive ? x.height * x.width
                                                              : p.kernel_h * p.kernel_w * y.height * y.width;
  return function_task(y.height, window * y.channels * kNumberWork / 2,
                       [p, f = KEGFAST_SELECT(pool_rows)](const TaskCall& call, int64_t begin, int64_t end) {
                         f(p, call.operands[0], call.y, begin, end);
                       });
}

std::unique_ptr<Task> place(const PlaceParams& p) {
  return function_task(p.y.height, p.y.image() * kNumberWork,
                       [p, f = KEGFAST_SELECT(place_rows)](const TaskCall& call, int64_t begin, int64_t end) {
                         f(p, call.operands[0], call.y, begin, end);
                       });
}

// Each image is a matrix (height * width, channels) that y holds transposed.
std::unique_ptr<Task> flatten(const Shape& x) {
  const int64_t pixels = x.height * x.width;
  const Shape turned{x.images, pixels, 1, x.channels, false};
  return place({turned, turned, {x.image(), x.channels, 0, 1}, 1, 1, 0, 0, 0});
}

std::unique_ptr<Task> concatenate(const std::vector<Input>& operands, const Shape& y) {
  std::vector<PlaceParams> parts;
  for (const Input& operand : operands)
    parts.push_back({operand.shape, y, operand.strides, 1, 1,
                     parts.empty() ? 0 : parts.back().front + parts.back().x.channels, 0, 0});
  return function_task(y.height, y.image() * kNumberWork,
                       [parts](const TaskCall& call, int64_t begin, int64_t end) {
                         const int64_t row = parts[0].y.width;
                         for (size_t i = 0; i < parts.size(); ++i) {
                           const PlaceParams& p = parts[i];
                           for (int64_t pixel = begin * row; pixel < end * row; ++pixel)
                             std::copy_n(call.operands[i] + pixel * p.x.channels, p.x.channels,
                                         call.y + pixel * p.y.channels + p.front);
                         }
                       });
}

// f(begin, count): numbers of whole rows.
template <class F>
std::unique_ptr<Task> by_row(const Shape& y, int64_t operands, const F& f) {
  const int64_t row = y.width * y.channels;
  return function_task(y.height, y.image() * operands * kNumberWork,
                       [f, row](const TaskCall& call, int64_t begin, int64_t end) {
                         f(call, begin * row, (end - begin) * row);
                       });
}

std::unique_ptr<Task> multiply(const std::vector<Input>& operands, const Shape& y) {
  if (operands[1].shape == y)
    return by_row(y, 2,
                  [f = KEGFAST_SELECT(multiply_numbers)](const TaskCall& call, int64_t at, int64_t count) {
                    f(call.operands[0] + at, call.operands[1] + at, call.y + at, count);
                  });
  const auto scale = [y, f = KEGFAST_SELECT(scale_pixels)](const TaskCall& call, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * y.width * y.channels, image = row / y.height;
      f(call.operands[0] + at, call.operands[1] + image * y.channels, nullptr, call.y + at, y.width,
        y.channels, false);
    }
  };
  return function_task(y.height, y.image() * kNumberWork, scale);
}

}  // namespace

Strides pixel_strides(const Shape& s) {
  return {s.image(), 1, s.width * s.channels, s.channels};
}

bool is_pixels(const Input& x) {
  const Strides want = pixel_strides(x.shape);
  const auto same = [](int64_t size, int64_t stride, int64_t wanted) {
    return size == 1 || stride == wanted;
  };
  return same(x.shape.images, x.strides.image, want.image) && same(x.shape.channels, x.strides.channel, 1) &&
         same(x.shape.height, x.strides.row, want.row) && same(x.shape.width, x.strides.pixel, want.pixel);
}

bool reads_any_strides(StepKind kind) {
  return kind == StepKind::convolution || kind == StepKind::conv_max_pool || kind == StepKind::place;
}

std::unique_ptr<Task> make_copy(const Input& x) {
  return place({x.shape, x.shape, x.strides, 1, 1, 0, 0, 0});
}

std::unique_ptr<Task> make_task(const Step& step, const std::vector<Input>& operands, const Shape& y,
                                int64_t threads) {
  const Input& x = operands[0];
  const auto& o = step.options;
  switch (step.kind) {
    case StepKind::convolution:
    case StepKind::linear:
      return convolution(step, operands, y, threads);
    case StepKind::tucker2:
      return std::make_unique<Tucker2Task>(step, operands, y, threads);
    case StepKind::conv_max_pool:
      return std::make_unique<ConvMaxPoolTask>(step, x, y);
    case StepKind::max_pool:
    case StepKind::average_pool:
    case StepKind::adaptive_average:
    case StepKind::mean:
      return pool(step, x.shape, y);
    case StepKind::add:
      return by_row(y, 2,
                    [relu = o[0] != 0, f = KEGFAST_SELECT(add_numbers)](const TaskCall& call, int64_t at,
                                                                        int64_t count) {
                      f(call.operands[0] + at, call.operands[1] + at, call.y + at, count, relu);
                    });
    case StepKind::multiply:
      return multiply(operands, y);
    case StepKind::concatenate:
      return concatenate(operands, y);
    case StepKind::flatten:
      return flatten(x.shape);
    case StepKind::activation:
      return by_row(y, 1,
                    [kind = static_cast<Activation>(o[0]), f = KEGFAST_SELECT(activate_numbers)](
                        const TaskCall& call, int64_t at, int64_t count) {
                      f(kind, call.operands[0] + at, call.y + at, count);
                    });
    case StepKind::softmax:
      return function_task(1, 4 * y.image() * kNumberWork,
                           [c = y.channels, log = o[0] != 0, f = KEGFAST_SELECT(softmax_rows)](
                               const TaskCall& call, int64_t begin, int64_t end) {
                             f(call.operands[0] + begin * c, call.y + begin * c, end - begin, c, log);
                           });
    case StepKind::place:
      return place({x.shape, y, x.strides, o[0], o[1], o[2], o[4], o[6]});
    case StepKind::affine:
      return by_row(y, 1,
                    [c = y.channels, relu = o[0] != 0, scale = step.weights[0].numbers.data(),
                     shift = step.weights[1].numbers.data(),
                     f = KEGFAST_SELECT(scale_pixels)](const TaskCall& call, int64_t at, int64_t count) {
                      f(call.operands[0] + at, scale, shift, call.y + at, count / c, c, relu);
                    });
  }
  throw std::invalid_argument("a step must be of a known kind");
}

}  // namespace kegfast
