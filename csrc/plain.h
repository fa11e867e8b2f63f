// Whether a call may pass by the dispatcher: plain tensors, plain modules, and nobody who wants to see
// operators.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace kegfast {

namespace py = pybind11;

py::object owned(PyObject* made);                     // throws what Python has raised
py::object attribute(py::handle of, PyObject* name);  //
py::object entry(py::handle dict, PyObject* name);    // null where there is none
void* implementation(py::handle tensor);              // its address, `_cdata`
inline void* implementation_or_null(py::handle tensor) {
  return tensor.is_none() ? nullptr : implementation(tensor);
}

// Of this thread: a mode, a transform, a tracer, a profiler, autocast, or forward-mode differentiation.
bool watched();

// Whether an implementation has the dispatch keys of dense numbers on the CPU and no others: it is not
// negated, wrapped, of zeros, sparse, quantized, nested.
bool has_plain_keys(const void* implementation);
// That of a tensor with such keys and of torch's own class, nobody's subclass; else null.
void* plain_implementation(py::handle x);

// Whether nn.Conv2d is as torch made it, and no hook is set for all modules.
bool convolutions_are_torchs();

// A module as it was: its class, its attributes one by one, and how much is in those that are dicts
// (parameters, hooks, children).
class SeenModule {
 public:
  explicit SeenModule(py::handle module);
  bool unchanged(py::handle module) const;

 private:
  struct Attribute {
    py::object name, value;  // value: null where it is no number, string or tuple of them
    Py_ssize_t entries;      // of a dict, else -1
  };
  static Attribute seen(PyObject* name, PyObject* value);

  py::object type_;
  std::vector<Attribute> attributes_;
};

void add_plain(py::module_& m);  // to _C

}  // namespace kegfast
