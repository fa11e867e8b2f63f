// Repeated calls of nn.TuckerConv2d from Python, past the dispatcher, which costs more than a small layer
// computes. All that decides a call is compared here and not in Python: 6->16@14, ranks 2/4, 5.3 -> 4.3 us;
// 64@8, rank 32, batch 8, after other work, when each line of code comes from memory, 61 -> 55.
#include "tucker2_repeat.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <memory>

#include "cpu/isa.h"
#include "cpu/seen_tensor.h"
#include "plain.h"
#include "tucker2.h"

namespace kegfast {
namespace {

constexpr int64_t kShareWork = 1'000'000;  // multiply-adds from which other Python threads may run meanwhile

// Names of attributes, and torch's part, which learn_handles fills. Never freed: Python may end first.
struct Names {
  PyObject* const layers[3] = {PyUnicode_InternFromString("first"), PyUnicode_InternFromString("core"),
                               PyUnicode_InternFromString("last")};
  PyObject* const parameters = PyUnicode_InternFromString("_parameters");
  PyObject* const weight = PyUnicode_InternFromString("weight");
  PyObject* const bias = PyUnicode_InternFromString("bias");
  PyObject* const version = PyUnicode_InternFromString("_version");
  PyObject* own = nullptr;  // tensors of a list of handles
};
Names& names() {
  static Names& known = *new Names;
  return known;
}

// A layer's first, core and last as they were when they were found to be what the operator stands for.
struct SeenParts {
  SeenModule parts[3];

  explicit SeenParts(const py::dict& modules)
      : parts{SeenModule(part(modules, 0)), SeenModule(part(modules, 1)), SeenModule(part(modules, 2))} {}

  bool unchanged(py::handle modules) const {
    if (!convolutions_are_torchs()) return false;
    for (int i = 0; i < 3; ++i) {
      const py::object found = entry(modules, names().layers[i]);
      if (!found || !parts[i].unchanged(found)) return false;
    }
    return true;
  }

 private:
  static py::object part(py::handle modules, int i) {
    py::object found = entry(modules, names().layers[i]);
    if (!found) throw py::key_error("first, core, last");
    return found;
  }
};

// What a call must find again to be repeated.
struct Settled {
  std::unique_ptr<Tucker2Prepared, decltype(&forget_prepared)> call;
  const SeenParts* parts;
  py::object kept;  // the parts, the factors' copies and their packed form
  py::object activation;
  void* implementations[4];
  PyTypeObject* types[4];
  long versions[3];  // -1: not compared, as bytes are
};

long version(py::handle tensor) {
  const long found = PyLong_AsLong(attribute(tensor, names().version).ptr());
  if (found < 0) throw py::error_already_set();
  return found;
}

// A layer's tensors as it has them now; whether they are those of the call.
struct Weights {
  py::object tensors[4];  // first, core, last, bias

  bool are_those_of(const Settled& settled, py::handle modules) {
    for (int i = 0; i < 3; ++i) {
      const py::object layer = entry(modules, names().layers[i]);
      const py::object parameters = attribute(layer, names().parameters);
      tensors[i] = entry(parameters, names().weight);
      py::object bias = entry(parameters, names().bias);
      if (i == 2)
        tensors[3] = std::move(bias);
      else if (!bias || !bias.is_none())
        return false;
    }
    for (int i = 0; i < 4; ++i) {
      if (!tensors[i] || Py_TYPE(tensors[i].ptr()) != settled.types[i]) return false;
      void* const found = implementation_or_null(tensors[i]);
      if (found != settled.implementations[i] || (found && !has_plain_keys(found))) return false;
      if (i < 3 && settled.versions[i] >= 0 && version(tensors[i]) != settled.versions[i]) return false;
    }
    return true;
  }
};

void* run(const Tucker2Prepared& call, void* x, void* addend) {
  if (prepared_work(call) < kShareWork) return run_prepared(call, x, addend);
  const py::gil_scoped_release others_run;
  return run_prepared(call, x, addend);
}

// y, or null.
py::object repeat(const Settled& settled, py::handle modules, py::handle activation, py::handle x,
                  py::handle addend) {
  Weights alive;  // also while others run
  if (activation.ptr() != settled.activation.ptr()) return {};
  void* const image = plain_implementation(x);
  void* const added = addend.is_none() ? nullptr : plain_implementation(addend);
  if (!image || (!addend.is_none() && !added) || watched() || !settled.parts->unchanged(modules) ||
      !alive.are_those_of(settled, modules))
    return {};
  void* const y = run(*settled.call, image, added);
  if (!y) return {};
  py::list handles(1);
  handles[0] = owned(PyCapsule_New(y, nullptr, nullptr));
  const py::object tensors = owned(PyObject_CallOneArg(names().own, handles.ptr()));
  return py::reinterpret_borrow<py::object>(PyList_GetItem(tensors.ptr(), 0));
}

template <class T>
const T* held(PyObject* capsule) {
  const auto* const found = static_cast<const T*>(PyCapsule_GetPointer(capsule, nullptr));
  if (!found) throw py::error_already_set();
  return found;
}

// Plain C functions: pybind11's own calls take longer than a small layer.
PyObject* repeat_tucker2(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError,
                    "repeat_tucker2 takes a settled call, modules, activation, x and addend");
    return nullptr;
  }
  if (arguments[0] == Py_None || grad_mode()) Py_RETURN_NONE;
  try {
    if (py::object y =
            repeat(*held<Settled>(arguments[0]), arguments[1], arguments[2], arguments[3], arguments[4]))
      return y.release().ptr();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) {
      error.restore();
      return nullptr;
    }  // else no versions, or no memory of its own
  } catch (const std::exception&) {
    // The operator names what is wrong.
  }
  Py_RETURN_NONE;
}

PyObject* parts_unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "parts_unchanged takes what see_parts returned and modules");
    return nullptr;
  }
  if (arguments[0] == Py_None) Py_RETURN_FALSE;
  try {
    return PyBool_FromLong(held<SeenParts>(arguments[0])->unchanged(arguments[1]));
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

template <class T>
py::object hold(std::unique_ptr<T> made) {
  py::capsule holder(made.get(), [](void* p) { delete static_cast<T*>(p); });
  made.release();
  return holder;
}

py::object see_parts(const py::dict& modules) {
  return hold(std::make_unique<SeenParts>(modules));
}

// None where every call needs what the operator does.
py::object settle_tucker2(py::object parts, py::object activation, py::handle x, const py::tuple& weights,
                          const py::tuple& copies, const py::object& packed, py::handle addend, bool final,
                          const std::array<int64_t, 6>& geometry) {
  Tucker2Tensors tensors{};
  tensors.x = implementation(x), tensors.packed = implementation(packed);
  tensors.bias = implementation_or_null(weights[3]), tensors.addend = implementation_or_null(addend);
  for (size_t i = 0; i < 3; ++i) {
    tensors.factors[i] = implementation(weights[i]);
    tensors.copies[i] = final ? nullptr : implementation(copies[i]);
  }
  Tucker2Prepared* const call = prepare_tucker2(tensors, geometry, !activation.is_none());
  if (!call) return py::none();
  const auto* const seen = held<SeenParts>(parts.ptr());
  auto settled = std::make_unique<Settled>(Settled{{call, &forget_prepared},
                                                   seen,
                                                   py::make_tuple(std::move(parts), copies, packed),
                                                   std::move(activation),
                                                   {},
                                                   {},
                                                   {}});
  for (size_t i = 0; i < 4; ++i) {
    const py::object weight = weights[i];
    settled->implementations[i] = implementation_or_null(weight), settled->types[i] = Py_TYPE(weight.ptr());
    if (i < 3) settled->versions[i] = final ? version(weight) : -1;
  }
  return hold(std::move(settled));
}

bool same_bytes_of(const py::tuple& tensors, const py::tuple& copies) {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!same_bytes(SeenTensor(implementation(tensors[i])), implementation(copies[i]))) return false;
  return true;
}

PyMethodDef plain_functions[] = {
    {"repeat_tucker2", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&repeat_tucker2)),
     METH_FASTCALL,
     "(settled call or None, the layer's modules, its activation, x, addend or None): y, or None where "
     "something has changed."},
    {"parts_unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&parts_unchanged)),
     METH_FASTCALL,
     "(what see_parts returned or None, the layer's modules): whether they are the same still."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_tucker2_repeat(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw py::error_already_set();
  m.def("see_parts", &see_parts, py::arg("modules"));
  m.def("settle_tucker2", &settle_tucker2, py::kw_only(), py::arg("parts"), py::arg("activation"),
        py::arg("x"), py::arg("weights"), py::arg("copies"), py::arg("packed"), py::arg("addend"),
        py::arg("final"), py::arg("geometry"));
  m.def("same_bytes", &same_bytes_of, py::arg("tensors"), py::arg("copies"));
  m.def("learn_handles", [](py::object own) { names().own = own.release().ptr(); }, py::arg("own"));
  m.def("unsettle", &unsettle);
  m.def("pairs_bfloat16", [] { return active_isa() >= Isa::avx512_bf16; });
}

}  // namespace kegfast
