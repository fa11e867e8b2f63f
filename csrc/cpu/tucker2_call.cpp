#include "cpu/tucker2_call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>

#include "check.h"
#include "cpu/kept_memory.h"
#include "cpu/shared_pages.h"

namespace kegfast {
namespace {

std::atomic<int64_t> most_winograd{2};

enum class Path : int { none, unfused, direct, winograd, winograd_f4 };
constexpr const char* kPaths[] = {"none", "unfused", "direct", "winograd", "winograd_f4"};
struct Ran {
  Path path;
  Isa isa;
};
std::atomic<Ran> last_run{{Path::none, Isa::baseline}};

void note_run(const Tucker2Params& p, const Tucker2Plan& plan) {
  // What multiplies no bfloat16 has no copy above avx512.
  const Isa isa = p.pairs ? active_isa() : std::min(active_isa(), Isa::avx512);
  const Path path = plan.winograd == 4 ? Path::winograd_f4 : plan.winograd ? Path::winograd : Path::direct;
  last_run.store({path, isa}, std::memory_order_relaxed);
}

struct Forms {
  std::shared_mutex lock;
  std::map<Tucker2Shape, Tucker2Form> of;
  std::atomic<bool> any{false};
  std::atomic<int64_t> choices{0};
};

Forms& all_forms() {
  static Forms& forms = *new Forms;
  return forms;
}

// Memory that a thread keeps between calls, so that no call pays for page faults.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > held_) {
      memory_.reset(
          static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64))));
      held_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t held_ = 0;
};

// f(begin, end) over `parts` equal shares of `units`, each a multiple of `grain`.
template <class F>
void share_out(int64_t parts, int64_t units, int64_t grain, const F& f) {
  run_parts(parts, [&](int64_t i) { f(units * i / parts * grain, units * (i + 1) / parts * grain); });
}

AtenTensorHandle new_tensor(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                            ScalarType type, int64_t least_kept = kLeastKept) {
  const auto dim = static_cast<int64_t>(sizes.size());
  const auto number = static_cast<int32_t>(type);
  int64_t bytes = type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= size;
  AtenTensorHandle made;
  if (bytes < least_kept) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.begin(), strides.begin(), number,
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return made;
  }
  KeptMemory* const memory = KeptMemory::take(bytes);
  const auto give_back = [](void*, void* of) { KeptMemory::give_back(static_cast<KeptMemory*>(of)); };
  TORCH_ERROR_CODE_CHECK(torch_from_blob(memory->data, dim, sizes.begin(), strides.begin(), 0, number,
                                         aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(),
                                         nullptr, 0, give_back, memory));
  return made;
}

AtenTensorHandle new_images(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, ScalarType type,
                            int64_t least_kept = kLeastKept) {
  if (channels_last) return new_tensor({n, c, h, w}, {h * w * c, 1, w * c, c}, type, least_kept);
  return new_tensor({n, c, h, w}, {c * h * w, h * w, w, 1}, type, least_kept);
}

}  // namespace

float* scratch(int64_t floats) {
  static thread_local Scratch memory;
  return memory.take(floats);
}

Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                     ScalarType type) {
  return Tensor(new_tensor(sizes, strides, type));
}

Tensor empty(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, ScalarType type) {
  return Tensor(new_images(n, c, h, w, channels_last, type));
}

AtenTensorHandle new_output(const Tucker2Params& p) {
  // Below it malloc's pages last from call to call, and torch's code for kept memory, out of cache, takes
  // longer than they do: 64@8, rank 32, batch 8, after another layer 61 us instead of 85.
  constexpr int64_t kLeastWorth = (1 << 20) + 1;
  const ScalarType type = p.type == Tucker2Type::float32 ? ScalarType::Float : ScalarType::BFloat16;
  return new_images(p.images, p.features, p.out_height, p.out_width, p.channels_last, type, kLeastWorth);
}

Tensor empty_flat(int64_t n, ScalarType type) {
  return empty_strided({n}, {1}, type);
}

Tensor empty_packed(int64_t floats) {
  constexpr int64_t kLeastShared = 64 << 10;
  const int64_t bytes = 4 * floats;
  if (bytes < kLeastShared) return empty_flat(floats);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto tensor = [&](void* data, const auto& give_back) {
    return torch::stable::from_blob(data, {floats}, {1}, cpu, ScalarType::Float, give_back);
  };
  if (bytes > SharedPages::kBytes / 2) {
    constexpr int64_t kPage = KeptMemory::kHugePage;
    KeptMemory* const memory = KeptMemory::take((bytes + kPage - 1) / kPage * kPage);
    return tensor(memory->data, [memory](void*) { KeptMemory::give_back(memory); });
  }
  const SharedPages::Block block = SharedPages::take(bytes);
  return tensor(block.data, [pages = block.pages](void*) { SharedPages::give_back(pages); });
}

bool reads_channels_last(const Tensor& x) {
  return x.stride(1) == 1 && x.size(2) * x.size(3) > 1;
}

Tensor readable(const Tensor& x) {
  if (reads_channels_last(x) || x.stride(3) == 1 || x.size(3) == 1) return x;
  return torch::stable::contiguous(x);
}

Tucker2Type type_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return Tucker2Type::float32;
  KEGFAST_CHECK(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half, "x",
                "float32, bfloat16 or float16", static_cast<int>(t.scalar_type()));
  return t.scalar_type() == ScalarType::BFloat16 ? Tucker2Type::bfloat16 : Tucker2Type::float16;
}

Tucker2Factor factor(const Tensor& weight) {  // (O, I, kh, kw)
  return {weight.const_data_ptr(), type_of(weight),  weight.stride(0), weight.stride(1),
          weight.stride(2),        weight.stride(3), weight.size(0),   weight.size(1)};
}

void check_weights(const Tensor& x, const Tensor& first, const Tensor& core, const Tensor& last,
                   const std::optional<Tensor>& bias) {
  KEGFAST_CHECK(x.dim() == 4, "x", "4-dimensional", x.dim());
  KEGFAST_CHECK(first.dim() == 4 && first.size(1) == x.size(1), "first",
                "(R1, C, 1, 1) with the channels of x", first.size(1));
  KEGFAST_CHECK(core.dim() == 4 && core.size(1) == first.size(0), "core", "(R2, R1, kh, kw)", core.size(1));
  KEGFAST_CHECK(last.dim() == 4 && last.size(1) == core.size(0), "last", "(K, R2, 1, 1)", last.size(1));
  check_in_memory("x", x);
  check_in_memory("first", first), check_in_memory("core", core), check_in_memory("last", last);
  if (bias) check_in_memory("bias", *bias);
  for (const Tensor* t : {&first, &core, &last})
    KEGFAST_CHECK(t->scalar_type() == x.scalar_type() && t->is_cpu(), "weights",
                  "tensors of x's type on x's device", static_cast<int>(t->scalar_type()));
  if (bias)
    KEGFAST_CHECK(bias->numel() == last.size(0) && bias->scalar_type() == x.scalar_type(), "bias",
                  "(K) of x's type", bias->numel());
}

void check_addend(const Tucker2Params& p, const Tensor& addend) {
  KEGFAST_CHECK(addend.dim() == 4 && addend.size(0) == p.images && addend.size(1) == p.features &&
                    addend.size(2) == p.out_height && addend.size(3) == p.out_width,
                "addend", "of the output's shape", addend.dim());
  KEGFAST_CHECK(addend.is_cpu() && type_of(addend) == p.type, "addend", "of x's type on x's device",
                static_cast<int>(addend.scalar_type()));
  check_in_memory("addend", addend);
}

bool lies_as_output(const Tucker2Params& p, const Tensor& t) {
  const int64_t plane = p.out_height * p.out_width, k = p.features;
  const int64_t strides[] = {k * plane, p.channels_last ? 1 : plane, p.out_width * (p.channels_last ? k : 1),
                             p.channels_last ? k : 1};
  for (int64_t i = 0; i < 4; ++i)
    if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
  return true;
}

bool is_packed_for(const Tucker2Plan& plan, const Tensor& packed) {
  return packed.numel() == plan.packed_floats && packed.const_data_ptr<float>()[0] == plan.packed_layout;
}

Tucker2Params geometry(int64_t images, int64_t channels, int64_t height, int64_t width, const Tensor& core,
                       int64_t features, const Geometry& g) {
  Tucker2Params p{};
  p.images = images, p.channels = channels, p.height = height, p.width = width, p.features = features;
  p.rank_in = core.size(1), p.rank_out = core.size(0), p.kernel_h = core.size(2), p.kernel_w = core.size(3);
  p.stride_h = g.stride_h, p.stride_w = g.stride_w, p.padding_h = g.padding_h, p.padding_w = g.padding_w;
  p.dilation_h = g.dilation_h, p.dilation_w = g.dilation_w;
  KEGFAST_CHECK(g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 && g.dilation_w > 0,
                "stride and dilation", "positive", g.stride_h);
  KEGFAST_CHECK(g.padding_h >= 0 && g.padding_w >= 0, "padding", "non-negative", g.padding_h);
  const int64_t reach_h = height + 2 * g.padding_h - (p.kernel_h - 1) * g.dilation_h - 1;
  const int64_t reach_w = width + 2 * g.padding_w - (p.kernel_w - 1) * g.dilation_w - 1;
  KEGFAST_CHECK(reach_h >= 0 && reach_w >= 0, "x", "at least as large as the core's window", height);
  p.out_height = reach_h / g.stride_h + 1, p.out_width = reach_w / g.stride_w + 1;
  p.winograd = tucker2_winograd();
  KEGFAST_CHECK(p.kernel_h * p.kernel_w <= 256, "core", "a window of at most 256 taps",
                p.kernel_h * p.kernel_w);
  return p;
}

void set_input(Tucker2Params& p, const Tensor& x) {
  p.channels_last = reads_channels_last(x);
  p.type = type_of(x);
  p.x = x.const_data_ptr();
  p.x_image = x.stride(0), p.x_channel = x.stride(1), p.x_row = x.stride(2), p.x_pixel = x.stride(3);
}

void choose_numbers(Tucker2Params& p) {
  if (p.type != Tucker2Type::bfloat16) return;
  p.pairs = active_isa() >= Isa::avx512_bf16;
  if (p.rank_in % 2 || p.rank_out % 2) p.winograd = 0;  // which packs whole factors
  p.rank_in += p.rank_in % 2;
  p.rank_out += p.rank_out % 2;
}

int64_t multiply_adds(const Tucker2Params& p) {
  return p.images *
         (p.height * p.width * p.channels * p.rank_in +
          p.out_height * p.out_width * p.rank_out * (p.rank_in * p.kernel_h * p.kernel_w + p.features));
}

int64_t work_of(const Tucker2Params& p) {
  // A pixel takes 2 to 3 ns however few its channels: 16 -> 16 on 32 x 32 at ranks 2/2 took 53 us for 0.8
  // million sums, 64 -> 64 on 8 x 8 at ranks 32/32 47 us for 6.8 million.
  constexpr int64_t kPixel = 250;
  return multiply_adds(p) + kPixel * p.images * (p.height * p.width + p.out_height * p.out_width);
}

// Below this a second thread costs more than it brings (about 15 us of one core). It costs 4 to 5 us where
// the pool is awake: layers of 47, 64 and 71 us took 28, 36 and 42 on two idle Zen 5 cores.
constexpr int64_t kSerialWork = 1'500'000;

int64_t threads_for(int64_t work, int64_t parts) {
  if (work < kSerialWork) return 1;
  return std::max<int64_t>(
      1, std::min<int64_t>({torch::stable::get_num_threads(), parts, work / (kSerialWork / 2)}));
}

void run_rows(const Tucker2Params& p, const Tucker2Plan& plan, int64_t threads) {
  note_run(p, plan);
  const auto kernel = KEGFAST_TUCKER2(p, tucker2_rows);
  const auto f = [&](int64_t begin, int64_t end) {
    kernel(p, plan, begin, end, scratch(plan.scratch_floats));
  };
  // Kept intermediates overlap between bands of an image, so then images are the unit.
  const bool by_image = p.images >= threads || p.t1;
  if (by_image)
    share_out(std::min(threads, p.images), p.images, p.out_height, f);
  else
    share_out(threads, p.images * p.out_height, 1, f);
}

void choose_tucker2(const Tucker2Shape& shape, Tucker2Form form) {
  Forms& forms = all_forms();
  const std::unique_lock guard(forms.lock);
  if (form == Tucker2Form::automatic)
    forms.of.erase(shape);
  else
    forms.of[shape] = form;
  forms.any.store(!forms.of.empty(), std::memory_order_release);
  forms.choices.fetch_add(1, std::memory_order_release);
}

void unsettle() {
  all_forms().choices.fetch_add(1, std::memory_order_release);
}
int64_t choices_made() {
  return all_forms().choices.load(std::memory_order_acquire);
}

void choose_form(Tucker2Params& p) {
  Forms& forms = all_forms();
  if (p.type != Tucker2Type::float32 || !forms.any.load(std::memory_order_acquire)) return;
  const Tucker2Shape shape{p.images,
                           p.channels,
                           p.height,
                           p.width,
                           p.rank_in,
                           p.rank_out,
                           p.features,
                           p.kernel_h,
                           p.kernel_w,
                           p.stride_h,
                           p.stride_w,
                           p.padding_h,
                           p.padding_w,
                           p.dilation_h,
                           p.dilation_w,
                           p.channels_last,
                           static_cast<int64_t>(torch::stable::get_num_threads())};
  const std::shared_lock guard(forms.lock);
  const auto found = forms.of.find(shape);
  if (found != forms.of.end()) p.form = found->second;
}

int64_t tucker2_winograd() {
  return most_winograd.load(std::memory_order_relaxed);
}
void set_tucker2_winograd(int64_t most) {
  most_winograd.store(most, std::memory_order_relaxed);
}
void note_unfused() {
  last_run.store({Path::unfused, Isa::baseline}, std::memory_order_relaxed);
}
std::string last_kernel() {
  const Ran ran = last_run.load(std::memory_order_relaxed);
  const std::string path = kPaths[static_cast<int>(ran.path)];
  return ran.path >= Path::direct ? path + " " + isa_name(ran.isa) : path;
}

}  // namespace kegfast
