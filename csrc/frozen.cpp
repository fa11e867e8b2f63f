// Frozen networks from Python: a network of its bytes, plans of it, and their runs on torch's threads.
#include "frozen.h"

#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <memory>
#include <string_view>

#include "plan.h"

namespace py = pybind11;

namespace kegfast {
namespace {

constexpr int64_t kShareWork = 1'000'000;  // multiply-adds from which other Python threads may run meanwhile
constexpr size_t kMostFast = 32;           // inputs and outputs

void run_on_torch(int64_t parts, Pool::Part part, void* context) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) part(context, i);
  });
}
constexpr Pool kTorch{&run_on_torch};

struct Frozen {
  Network network;
  PackedWeights weights;
};

struct FrozenPlan {
  std::shared_ptr<Frozen> of;  // outlives the plan, which reads its weights
  Plan plan;
};

std::shared_ptr<Frozen> read_frozen(const py::bytes& bytes) {
  const std::string_view view(bytes);
  auto frozen = std::make_shared<Frozen>();
  frozen->network = read_network(view.data(), view.size());
  return frozen;
}

Input input_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || (sizes.size() != 2 && sizes.size() != 4))
    throw std::invalid_argument("an input must be of shape (N, C, H, W) or (N, C), got " +
                                std::to_string(sizes.size()) + " dimensions");
  if (sizes.size() == 2) return {{sizes[0], sizes[1], 1, 1, true}, {strides[0], strides[1], 0, 0}};
  return {{sizes[0], sizes[1], sizes[2], sizes[3], false}, {strides[0], strides[1], strides[2], strides[3]}};
}

std::unique_ptr<FrozenPlan> plan_frozen(std::shared_ptr<Frozen> frozen,
                                        const std::vector<std::vector<int64_t>>& sizes,
                                        const std::vector<std::vector<int64_t>>& strides, int64_t threads) {
  std::vector<Input> inputs;
  for (size_t i = 0; i < sizes.size(); ++i) inputs.push_back(input_of(sizes[i], strides[i]));
  Frozen& f = *frozen;
  return std::unique_ptr<FrozenPlan>(
      new FrozenPlan{std::move(frozen), {f.network, f.weights, inputs, threads}});
}

std::vector<std::vector<int64_t>> output_sizes(const FrozenPlan& frozen) {
  std::vector<std::vector<int64_t>> sizes;
  for (const Shape& s : frozen.plan.outputs())
    sizes.push_back(s.vector ? std::vector<int64_t>{s.images, s.channels}
                             : std::vector<int64_t>{s.images, s.channels, s.height, s.width});
  return sizes;
}

void run(const Plan& plan, const float* const* inputs, float* const* outputs, double* seconds = nullptr) {
  if (plan.work() < kShareWork) return plan.run(inputs, outputs, kTorch, seconds);
  const py::gil_scoped_release others_run;
  plan.run(inputs, outputs, kTorch, seconds);
}

// (address of a plan, addresses of the inputs, then of the outputs): whether it ran, on the instruction set
// that it was made for. A plain C function: pybind11's own calls take as long as a small network.
PyObject* run_frozen(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 3 || static_cast<size_t>(count) > kMostFast) {
    PyErr_SetString(PyExc_TypeError, "run_frozen takes a plan and its inputs' and outputs' addresses");
    return nullptr;
  }
  void* addresses[kMostFast];
  for (Py_ssize_t i = 0; i < count; ++i) addresses[i] = PyLong_AsVoidPtr(arguments[i]);
  if (PyErr_Occurred()) return nullptr;
  const auto& frozen = *static_cast<const FrozenPlan*>(addresses[0]);
  if (frozen.plan.isa() != active_isa()) Py_RETURN_FALSE;
  const auto inputs = static_cast<size_t>(frozen.of->network.inputs);
  try {
    run(frozen.plan, const_cast<const float**>(reinterpret_cast<float**>(addresses + 1)),
        reinterpret_cast<float**>(addresses + 1 + inputs));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

// Seconds that each step took in a run of its own.
std::vector<double> time_frozen(const FrozenPlan& frozen, const std::vector<uintptr_t>& addresses) {
  std::vector<double> seconds(frozen.of->network.steps.size());
  std::vector<float*> values;
  for (const uintptr_t address : addresses) values.push_back(reinterpret_cast<float*>(address));
  const auto inputs = static_cast<size_t>(frozen.of->network.inputs);
  if (values.size() != inputs + frozen.plan.outputs().size())
    throw std::invalid_argument("time_frozen takes the addresses of all inputs and outputs");
  run(frozen.plan, values.data(), values.data() + inputs, seconds.data());
  return seconds;
}

PyMethodDef plain_functions[] = {
    {"run_frozen", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_frozen)), METH_FASTCALL,
     "Runs a plan by addresses; False: it is not for the active instruction set."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_frozen(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw py::error_already_set();
  py::class_<Frozen, std::shared_ptr<Frozen>>(m, "FrozenNetwork");
  py::class_<FrozenPlan>(m, "FrozenPlan")
      .def_property_readonly("address",
                             [](const FrozenPlan& plan) { return reinterpret_cast<uintptr_t>(&plan); })
      .def_property_readonly("output_sizes", &output_sizes)
      .def("seconds", &time_frozen, py::arg("addresses"));
  m.def("read_frozen", &read_frozen, py::arg("bytes"));
  m.def("plan_frozen", &plan_frozen, py::arg("network"), py::arg("sizes"), py::arg("strides"),
        py::arg("threads"));
}

}  // namespace kegfast
