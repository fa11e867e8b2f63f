// A network planned for inputs of one size, one instruction set and so many threads: a flat list of tasks
// over one arena whose buffers share memory where their lifetimes allow. Between the first task and the last
// nothing is allocated.
#pragma once

#include <atomic>
#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/isa.h"
#include "network.h"
#include "plan_kernels.h"

namespace kegfast {

class KeptMemory;

// Threads to share work out to: run(of, parts, f, context) calls f(context, i) for every part, side by side.
struct Pool {
  using Part = void (*)(void* context, int64_t part);
  void (*run)(int64_t parts, Part f, void* context);
};

// Weights in the order in which kernels read them, packed once for each instruction set and form.
class PackedWeights {
 public:
  struct Key {
    size_t step;
    Isa isa;
    int64_t form;
    auto operator<=>(const Key&) const = default;
  };
  using Pack = std::function<void(float*)>;
  // What lies under each key, in floats from 64-byte addresses; those not there yet are packed side by side.
  struct Wanted {
    Key key;
    int64_t floats;
    Pack pack;
  };
  std::vector<const float*> take(const std::vector<Wanted>& wanted);

  ~PackedWeights();

 private:
  std::mutex lock_;
  std::map<Key, const float*> found_;
  std::vector<KeptMemory*> blocks_;
};

// Where one image's share of a step's work is done.
struct TaskCall {
  const float* const* operands;
  float* y;
  float* scratch;
};

// A step with everything settled but where its values lie.
class Task {
 public:
  virtual ~Task() = default;
  virtual void run(const TaskCall& call, int64_t begin, int64_t end) const = 0;

  int64_t units = 1;  // of an image, that threads may share; run does begin <= n * units + unit < end
  int64_t work = 0;   // of an image, in multiply-adds that take as long
  int64_t scratch_floats = 0;
  int64_t form = 0, packed_floats = 0;
  PackedWeights::Pack pack;
  const float* packed = nullptr;
};

struct Input {
  Shape shape;
  Strides strides;  // in elements
};

class Plan {
 public:
  // Throws std::invalid_argument for inputs that the network does not take. The network and its weights must
  // live on.
  Plan(const Network& network, PackedWeights& weights, const std::vector<Input>& inputs, int64_t threads);
  ~Plan();

  const std::vector<Shape>& outputs() const { return outputs_; }
  int64_t work() const { return work_; }  // multiply-adds, about
  Isa isa() const { return isa_; }
  int64_t threads() const { return threads_; }

  // Outputs are pixels of contiguous channels. `seconds`, one per step of the network, or null: what each
  // took.
  void run(const float* const* inputs, float* const* outputs, const Pool& pool,
           double* seconds = nullptr) const;

 private:
  // Where a value lies: in the arena, or in the caller's inputs or outputs.
  struct Place {
    enum Kind { arena, input, output } kind;
    int64_t at;     // floats into the arena, or which
    int64_t image;  // floats from one image to the next; 0: it holds those of one pass alone
  };
  struct Planned {
    std::unique_ptr<Task> task;
    std::vector<Place> operands;
    Place y;
    int64_t step;   // of the network; -1: it brings an input into order
    int64_t parts;  // threads that share its work, where they do not share images
  };
  // Tasks that take so many images at a time from the first of them to the last.
  struct Segment {
    size_t begin, end;
    int64_t images;
  };
  struct Layout;  // of the arena, while planning
  struct Run;     // where its values lie

  void choose_segments(const Network& network, const std::vector<Shape>& shapes);
  void run_images(const Run& run, const Segment& segment, int64_t thread, int64_t begin, int64_t end) const;
  void run_task(const Run& run, const Planned& planned, int64_t thread, int64_t image, int64_t begin,
                int64_t end) const;

  std::vector<Planned> tasks_;
  std::vector<Segment> segments_;
  std::vector<Shape> outputs_;
  Isa isa_;
  int64_t threads_, images_, work_ = 0;
  int64_t arena_floats_ = 0, scratch_floats_ = 0;
  bool by_image_ = false;  // each thread takes images of its own through all tasks, in an arena of its own
  mutable std::atomic<KeptMemory*> waiting_{nullptr};  // of a run before: arenas, then each thread's scratch
};

// A step's task for operands that lie as `inputs` say.
std::unique_ptr<Task> make_task(const Step& step, const std::vector<Input>& operands, const Shape& y,
                                int64_t threads);
// x as pixels of contiguous channels.
std::unique_ptr<Task> make_copy(const Input& x);
bool is_pixels(const Input& x);
Strides pixel_strides(const Shape& shape);
bool reads_any_strides(StepKind kind);

}  // namespace kegfast
