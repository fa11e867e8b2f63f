#include "plan.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "cpu/denormals.h"
#include "cpu/kept_memory.h"

namespace kegfast {
namespace {

constexpr int64_t kLine = 16;  // floats
constexpr int64_t kSerialWork =
    1'500'000;                        // as of threads_for: below it a second thread costs more than it brings
constexpr size_t kMostOperands = 64;  // whose places a run keeps on its stack

int64_t lines(int64_t floats) {
  return (floats + kLine - 1) / kLine * kLine;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t second_level_cache() {  // bytes
  static const int64_t bytes = [] {
    constexpr int64_t kUsual = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return found;
#endif
    return kUsual;
  }();
  return bytes;
}

// First fit: buffers that live at one time do not share memory.
class Arena {
 public:
  int64_t take(int64_t floats) {
    int64_t at = 0;
    auto before = live_.begin();
    for (; before != live_.end() && before->first - at < floats; ++before)
      at = before->first + before->second;
    live_[at] = floats;
    size_ = std::max(size_, at + floats);
    return at;
  }
  void give_back(int64_t at) { live_.erase(at); }
  int64_t size() const { return size_; }

 private:
  std::map<int64_t, int64_t> live_;  // floats from each place
  int64_t size_ = 0;
};

// Of a step that overwrites an operand number by number: which ones it may.
std::vector<size_t> overwritable(const Step& step) {
  switch (step.kind) {
    case StepKind::convolution:
    case StepKind::tucker2:
    case StepKind::linear:
      return step.operands.size() == 2 ? std::vector<size_t>{1} : std::vector<size_t>{};
    case StepKind::add:
      return {0, 1};
    case StepKind::multiply:
    case StepKind::activation:
    case StepKind::affine:
      return {0};
    default:
      return {};
  }
}

}  // namespace

std::vector<const float*> PackedWeights::take(const std::vector<Wanted>& wanted) {
  const std::lock_guard guard(lock_);
  int64_t floats = 0;
  for (const Wanted& w : wanted)
    if (!found_.contains(w.key)) floats += lines(w.floats);
  if (floats > 0) {
    KeptMemory* const block = KeptMemory::take(floats * static_cast<int64_t>(sizeof(float)));
    blocks_.push_back(block);
    auto* at = static_cast<float*>(block->data);
    for (const Wanted& w : wanted) {
      if (found_.contains(w.key)) continue;
      w.pack(at);
      found_[w.key] = at;
      at += lines(w.floats);
    }
  }
  std::vector<const float*> places;
  for (const Wanted& w : wanted) places.push_back(found_.at(w.key));
  return places;
}

PackedWeights::~PackedWeights() {
  for (KeptMemory* const block : blocks_) KeptMemory::give_back(block);
}

// Values on their way through the plan.
struct Plan::Layout {
  struct Value {
    Input lies;
    int64_t segment = -1;             // that makes it; or an input
    int64_t last_use = -1, last = 0;  // step and segment; or none
    int64_t output = -1;              // which; or none
    Place place{};
    bool wide() const { return last > segment || output >= 0 || segment < 0; }  // holds all images
  };
  std::vector<Value> values;
  Arena arena;

  Value& operator[](int64_t i) { return values[static_cast<size_t>(i)]; }

  void take(Value& value, int64_t images) {
    value.place = {Place::arena, arena.take(lines(images * value.lies.shape.image())),
                   value.wide() ? value.lies.shape.image() : 0};
  }
  // The memory of an operand that is used for the last time, for a value of its size; or null.
  Value* overwritten(const Step& step, int64_t at, const Value& y) {
    for (const size_t i : overwritable(step)) {
      Value& x = (*this)[step.operands[i]];
      const auto uses = std::count(step.operands.begin(), step.operands.end(), step.operands[i]);
      if (uses == 1 && x.last_use == at && !x.wide() && !y.wide() && x.lies.shape == y.lies.shape) return &x;
    }
    return nullptr;
  }
};

// All images together, or, as long as a step's images outweigh its weights and L2 would not hold those of
// all, few of them through several steps at a time.
void Plan::choose_segments(const Network& network, const std::vector<Shape>& shapes) {
  by_image_ = threads_ > 1 && images_ >= threads_ && (images_ % threads_ == 0 || images_ >= 4 * threads_);
  const int64_t images = by_image_ ? (images_ + threads_ - 1) / threads_ : images_;
  const bool passes = threads_ == 1 || by_image_;
  for (size_t at = 0; at < network.steps.size(); ++at) {
    const Step& step = network.steps[at];
    int64_t weights = 0, numbers = shapes[static_cast<size_t>(network.inputs) + at].image();
    for (const Weight& w : step.weights) weights += static_cast<int64_t>(w.numbers.size());
    for (const int64_t i : step.operands) numbers += shapes[static_cast<size_t>(i)].image();
    const int64_t fit = second_level_cache() / 4 / (numbers * static_cast<int64_t>(sizeof(float)));
    const bool few = passes && 2 * weights < numbers && 2 * fit < images;
    const int64_t together = few ? std::max<int64_t>(fit, 1) : images;
    Segment* const last = segments_.empty() ? nullptr : &segments_.back();
    if (last && (last->images == images) == (together == images))
      last->end = at + 1, last->images = std::min(last->images, together);
    else
      segments_.push_back({at, at + 1, together});
  }
}

Plan::Plan(const Network& network, PackedWeights& weights, const std::vector<Input>& inputs, int64_t threads)
    : isa_(active_isa()), threads_(threads) {
  if (static_cast<int64_t>(inputs.size()) != network.inputs)
    throw std::invalid_argument("inputs must be " + std::to_string(network.inputs) + ", got " +
                                std::to_string(inputs.size()));
  images_ = inputs[0].shape.images;
  Layout layout;
  std::vector<Shape> shapes;
  for (const Input& input : inputs) layout.values.push_back({input}), shapes.push_back(input.shape);
  for (const Step& step : network.steps) {
    std::vector<Shape> operands;
    for (const int64_t i : step.operands) operands.push_back(shapes[static_cast<size_t>(i)]);
    shapes.push_back(shape_of(step, operands));
    layout.values.push_back({{shapes.back(), pixel_strides(shapes.back())}});
  }
  choose_segments(network, shapes);
  for (size_t s = 0; s < segments_.size(); ++s)
    for (size_t at = segments_[s].begin; at < segments_[s].end; ++at) {
      layout[network.inputs + static_cast<int64_t>(at)].segment = static_cast<int64_t>(s);
      for (const int64_t i : network.steps[at].operands)
        layout[i].last_use = static_cast<int64_t>(at), layout[i].last = static_cast<int64_t>(s);
    }
  for (size_t i = 0; i < network.outputs.size(); ++i) {
    Layout::Value& value = layout[network.outputs[i]];
    value.output = static_cast<int64_t>(i);
    outputs_.push_back(value.lies.shape);
  }

  const auto plan_task = [&](std::unique_ptr<Task> task, std::vector<Place> operands, Place y, int64_t step) {
    const int64_t work = task->work * images_;
    work_ += work;
    scratch_floats_ = std::max(scratch_floats_, lines(task->scratch_floats));
    const int64_t parts =
        work < kSerialWork ? 1 : std::min({threads, task->units * images_, work / (kSerialWork / 2)});
    tasks_.push_back({std::move(task), std::move(operands), y, step, std::max<int64_t>(parts, 1)});
  };
  const auto of_pass = [](Input input, int64_t images) {
    input.shape.images = images;
    return input;
  };
  for (int64_t i = 0; i < network.inputs;
       ++i) {  // those that lie as some step cannot read them are copied first
    Layout::Value& value = layout[i];
    value.place = {Place::input, i, value.lies.strides.image};
    const bool pixels = is_pixels(value.lies);
    const bool copied =
        !pixels && std::any_of(network.steps.begin(), network.steps.end(), [&](const Step& step) {
          const bool reads = step.operands[0] == i && reads_any_strides(step.kind);
          return std::count(step.operands.begin(), step.operands.end(), i) > reads;
        });
    if (!pixels && !copied) continue;
    if (copied) {
      const Place from = value.place;
      layout.take(value, images_);
      plan_task(make_copy(of_pass(value.lies, segments_[0].images)), {from}, value.place, -1);
    }
    value.lies.strides = pixel_strides(value.lies.shape);
  }
  const size_t copies = tasks_.size();
  for (Segment& segment : segments_) {
    const int64_t number = &segment - segments_.data();
    for (size_t at = segment.begin; at < segment.end; ++at) {
      Layout::Value& y = layout[network.inputs + static_cast<int64_t>(at)];
      if (y.output >= 0)
        y.place = {Place::output, y.output, y.lies.shape.image()};
      else if (y.wide())
        layout.take(y, images_);
    }
    for (size_t at = segment.begin; at < segment.end; ++at) {
      const Step& step = network.steps[at];
      const auto now = static_cast<int64_t>(at);
      Layout::Value& y = layout[network.inputs + now];
      std::vector<Input> operands;
      std::vector<Place> from;
      for (const int64_t i : step.operands) {
        operands.push_back(of_pass(layout[i].lies, segment.images));
        from.push_back(layout[i].place);
      }
      Layout::Value* const over = layout.overwritten(step, now, y);
      if (over)
        y.place = over->place;
      else if (!y.wide())
        layout.take(y, segment.images);
      Shape made = y.lies.shape;
      made.images = segment.images;
      plan_task(make_task(step, operands, made, by_image_ ? 1 : threads), from, y.place, now);
      for (const int64_t i : step.operands)
        if (layout[i].last_use == now && !layout[i].wide() && &layout[i] != over)
          layout.arena.give_back(layout[i].place.at);
      if (y.last_use < 0 && !y.wide()) layout.arena.give_back(y.place.at);
    }
    for (Layout::Value& value : layout.values)
      if (value.wide() && value.place.kind == Place::arena && value.last == number && value.segment < number)
        layout.arena.give_back(value.place.at);
    segment.begin += number == 0 ? 0 : copies;
    segment.end += copies;
  }
  arena_floats_ = layout.arena.size();

  std::vector<PackedWeights::Wanted> wanted;
  for (const Planned& planned : tasks_)
    if (planned.task->packed_floats)
      wanted.push_back({{static_cast<size_t>(planned.step), isa_, planned.task->form},
                        planned.task->packed_floats,
                        planned.task->pack});
  const std::vector<const float*> packed = weights.take(wanted);
  auto next = packed.begin();
  for (Planned& planned : tasks_)
    if (planned.task->packed_floats) planned.task->packed = *next++;
}

Plan::~Plan() {
  if (KeptMemory* const memory = waiting_.load()) KeptMemory::give_back(memory);
}

struct Plan::Run {
  const float* const* inputs;
  float* const* outputs;
  float *arenas, *scratch;
  const Pool& pool;
  double* seconds;
  const Plan& plan;

  float* at(Place place, int64_t thread, int64_t image) const {
    const int64_t offset = image * place.image;
    if (place.kind == Place::input) return const_cast<float*>(inputs[place.at]) + offset;
    if (place.kind == Place::output) return outputs[place.at] + offset;
    return arenas + (plan.by_image_ ? thread * plan.arena_floats_ : 0) + place.at + offset;
  }
};

// Units begin <= n * units + unit < end of the images from `image` on.
void Plan::run_task(const Run& run, const Planned& planned, int64_t thread, int64_t image, int64_t begin,
                    int64_t end) const {
  const float* few[kMostOperands];
  std::vector<const float*> many;
  const float** operands = few;
  if (planned.operands.size() > kMostOperands) many.resize(planned.operands.size()), operands = many.data();
  for (size_t i = 0; i < planned.operands.size(); ++i)
    operands[i] = run.at(planned.operands[i], thread, image);
  planned.task->run({operands, run.at(planned.y, thread, image), run.scratch + thread * scratch_floats_},
                    begin, end);
}

// All of a segment for some images, pass by pass; thread -1: by as many as pay, else by that one.
void Plan::run_images(const Run& run, const Segment& segment, int64_t thread, int64_t begin,
                      int64_t end) const {
  const FlushDenormals flush;
  for (int64_t image = begin; image < end; image += segment.images) {
    const int64_t count = std::min(segment.images, end - image);
    for (size_t i = segment.begin; i < segment.end; ++i) {
      const Planned& planned = tasks_[i];
      const double start = run.seconds ? now() : 0;
      const int64_t units = planned.task->units * count;
      if (thread >= 0 || planned.parts == 1) {
        run_task(run, planned, std::max<int64_t>(thread, 0), image, 0, units);
      } else {
        struct Share {
          const Run& run;
          const Planned& planned;
          int64_t image, units, parts;
        } share{run, planned, image, units, std::min(planned.parts, units)};
        run.pool.run(
            share.parts,
            [](void* context, int64_t part) {
              const FlushDenormals flush;
              const Share& s = *static_cast<const Share*>(context);
              s.run.plan.run_task(s.run, s.planned, part, s.image, s.units * part / s.parts,
                                  s.units * (part + 1) / s.parts);
            },
            &share);
      }
      if (run.seconds) run.seconds[std::max<int64_t>(planned.step, 0)] += now() - start;
    }
  }
}

void Plan::run(const float* const* inputs, float* const* outputs, const Pool& pool, double* seconds) const {
  if (images_ == 0) return;
  const int64_t arenas = (by_image_ ? threads_ : 1) * arena_floats_;
  KeptMemory* memory = waiting_.exchange(nullptr, std::memory_order_acquire);
  if (!memory) {
    const int64_t floats = arenas + threads_ * scratch_floats_;
    memory = KeptMemory::take(std::max<int64_t>(floats, 1) * static_cast<int64_t>(sizeof(float)));
  }
  auto* const data = static_cast<float*>(memory->data);
  const Run run{inputs, outputs, data, data + arenas, pool, seconds, *this};
  if (by_image_ && (seconds || work_ < kSerialWork)) {
    for (int64_t part = 0; part < threads_; ++part)
      for (const Segment& segment : segments_)
        run_images(run, segment, part, images_ * part / threads_, images_ * (part + 1) / threads_);
  } else if (by_image_) {
    pool.run(
        threads_,
        [](void* context, int64_t part) {
          const Run& r = *static_cast<const Run*>(context);
          const Plan& plan = r.plan;
          for (const Segment& segment : plan.segments_)
            plan.run_images(r, segment, part, plan.images_ * part / plan.threads_,
                            plan.images_ * (part + 1) / plan.threads_);
        },
        const_cast<Run*>(&run));
  } else {
    for (const Segment& segment : segments_) run_images(run, segment, -1, 0, images_);
  }
  KeptMemory* none = nullptr;
  if (!waiting_.compare_exchange_strong(none, memory, std::memory_order_release))
    KeptMemory::give_back(memory);
}

}  // namespace kegfast
