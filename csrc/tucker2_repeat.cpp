// Repeated calls of nn.TuckerConv2d from Python, past the dispatcher, which costs more than a small layer
// computes. All that decides a call is compared here and not in Python: 6->16@14, ranks 2/4, 5.3 -> 4.3 us; 64@8,
// rank 32, batch 8, after other work, when each line of code comes from memory, 61 -> 55. What is left beside the
// kernel: nn.Module's own call 0.7 us, comparing 0.7, an output from torch 0.6.
#include "tucker2_repeat.h"

#include <pybind11/pybind11.h>

#include <exception>
#include <vector>

#include "cpu/isa.h"
#include "tucker2.h"

namespace py = pybind11;

namespace kegfast {
namespace {

constexpr int64_t kShareWork = 1'000'000;  // multiply-adds from which other Python threads may run meanwhile

// Names of attributes, and torch's part, which learn_torch fills. Never freed: Python may end first.
struct Python {
  PyObject* const first = PyUnicode_InternFromString("first");
  PyObject* const core = PyUnicode_InternFromString("core");
  PyObject* const last = PyUnicode_InternFromString("last");
  PyObject* const parameters = PyUnicode_InternFromString("_parameters");
  PyObject* const weight = PyUnicode_InternFromString("weight");
  PyObject* const bias = PyUnicode_InternFromString("bias");
  PyObject* const options[3] = {PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("padding"),
                                PyUnicode_InternFromString("dilation")};
  PyObject* const implementation = PyUnicode_InternFromString("_cdata");
  PyObject* const version = PyUnicode_InternFromString("_version");
  PyObject* const is_negated = PyUnicode_InternFromString("is_neg");

  PyObject* tensor = nullptr;         // the class
  PyObject* own = nullptr;            // tensors of a list of handles
  std::vector<PyObject*> bystanders;  // functions: whether something wants to see operators
};
Python& python() {
  static Python& names = *new Python;
  return names;
}

// What a call must find again to be repeated.
struct Settled {
  Tucker2Prepared* const call;
  py::object options;  // (stride, padding, dilation, activation)
  py::object kept;     // the factors' memory, and their packed form
  void* implementations[4];
  long versions[3];

  ~Settled() { forget_prepared(call); }
};

py::object owned(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
py::object attribute(py::handle of, PyObject* name) {
  return owned(PyObject_GetAttr(of.ptr(), name));
}
py::object entry(py::handle dict, PyObject* name) {  // null where there is none
  if (!PyDict_Check(dict.ptr())) return {};
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict.ptr(), name));
}
void* implementation(py::handle tensor) {
  void* const found = PyLong_AsVoidPtr(attribute(tensor, python().implementation).ptr());
  if (!found) throw py::error_already_set();
  return found;
}
long version(py::handle tensor) {
  const long found = PyLong_AsLong(attribute(tensor, python().version).ptr());
  if (found < 0) throw py::error_already_set();
  return found;
}

bool watched() {
  for (PyObject* const asks : python().bystanders)
    if (const int yes = PyObject_IsTrue(owned(PyObject_CallNoArgs(asks)).ptr())) {
      if (yes < 0) throw py::error_already_set();
      return true;
    }
  return false;
}

// Numbers in memory as they are, and nobody's subclass.
bool is_plain(py::handle x) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != python().tensor) return false;
  return owned(PyObject_CallMethodNoArgs(x.ptr(), python().is_negated)).ptr() == Py_False;
}

// A layer's tensors as it has them now; whether they are those of the call. Where one is parametrised, they
// are not.
struct Weights {
  py::object first, core, last, bias;

  bool are_those_of(const Settled& settled, py::handle modules, py::handle activation) {
    const Python& names = python();
    const py::object layers[] = {entry(modules, names.first), entry(modules, names.core),
                                 entry(modules, names.last)};
    py::object* const weights[] = {&first, &core, &last};
    for (int i = 0; i < 3; ++i) {
      if (!layers[i]) return false;
      const py::object parameters = attribute(layers[i], names.parameters);
      *weights[i] = entry(parameters, names.weight);
      if (!*weights[i] || implementation(*weights[i]) != settled.implementations[i] ||
          version(*weights[i]) != settled.versions[i])
        return false;
      if (i == 2) bias = entry(parameters, names.bias);
    }
    if (!bias || (bias.is_none() ? nullptr : implementation(bias)) != settled.implementations[3])
      return false;
    for (int i = 0; i < 3; ++i)
      if (!is(attribute(layers[1], names.options[i]), settled, i)) return false;
    return is(activation, settled, 3);
  }

 private:
  static bool is(py::handle found, const Settled& settled, int option) {
    const int same =
        PyObject_RichCompareBool(found.ptr(), PyTuple_GET_ITEM(settled.options.ptr(), option), Py_EQ);
    if (same < 0) throw py::error_already_set();
    return same;
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
  if (!is_plain(x) || (!addend.is_none() && !is_plain(addend)) || watched() ||
      !alive.are_those_of(settled, modules, activation))
    return {};
  void* const y = run(*settled.call, implementation(x), addend.is_none() ? nullptr : implementation(addend));
  if (!y) return {};
  py::list handles(1);
  handles[0] = owned(PyCapsule_New(y, nullptr, nullptr));
  const py::object tensors = owned(PyObject_CallOneArg(python().own, handles.ptr()));
  return py::reinterpret_borrow<py::object>(PyList_GetItem(tensors.ptr(), 0));
}

// A plain C function: pybind11's own calls take longer than a small layer.
PyObject* repeat_tucker2(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError,
                    "repeat_tucker2 takes a settled call, modules, activation, x and addend");
    return nullptr;
  }
  if (arguments[0] == Py_None || grad_mode()) Py_RETURN_NONE;
  try {
    const auto* const settled = static_cast<const Settled*>(PyCapsule_GetPointer(arguments[0], nullptr));
    if (!settled) return nullptr;
    if (py::object y = repeat(*settled, arguments[1], arguments[2], arguments[3], arguments[4]))
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

// Settles the call that tucker2_prepare has made of x, the four weights and options; None where it was made
// of others.
py::object settle_tucker2(size_t address, py::handle x, const py::tuple& weights, py::object options,
                          py::object kept) {
  auto* const call = reinterpret_cast<Tucker2Prepared*>(address);
  auto* const settled = new Settled{call, std::move(options), std::move(kept), {}, {}};
  py::capsule holder(settled, [](void* p) { delete static_cast<Settled*>(p); });
  std::vector<void*> tensors{implementation(x)};
  for (size_t i = 0; i < 4; ++i)
    if (!weights[i].is_none()) {
      tensors.push_back(settled->implementations[i] = implementation(weights[i]));
      if (i < 3) settled->versions[i] = version(weights[i]);
    }
  return tensors == prepared_tensors(*call) ? py::object(holder) : py::none();
}

void learn_torch(py::object tensor, py::object own, const py::tuple& bystanders) {
  Python& known = python();
  known.tensor = tensor.release().ptr(), known.own = own.release().ptr();
  known.bystanders.clear();
  for (const py::handle asks : bystanders) known.bystanders.push_back(asks.inc_ref().ptr());
}

PyMethodDef plain_functions[] = {
    {"repeat_tucker2", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&repeat_tucker2)),
     METH_FASTCALL,
     "(settled call or None, the layer's modules, its activation, x, addend or None): y, or None where "
     "something "
     "has changed."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_tucker2_repeat(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw py::error_already_set();
  m.def("settle_tucker2", &settle_tucker2, py::arg("address"), py::arg("x"), py::arg("weights"),
        py::arg("options"), py::arg("kept"));
  m.def("learn_torch", &learn_torch, py::arg("tensor"), py::arg("own"), py::arg("bystanders"));
  m.def("unsettle", &unsettle);
  m.def("pairs_bfloat16", [] { return active_isa() >= Isa::avx512_bf16; });
}

}  // namespace kegfast
