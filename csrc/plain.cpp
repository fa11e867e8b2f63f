#include "plain.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace kegfast {
namespace {

// A function of torch's, as its namespace must still have it.
struct Own {
  PyObject *space, *name, *value;
};

using Keys = std::array<uint64_t, 2>;  // included, excluded

// A thread's own dispatch keys as torch keeps them: two words, or null where this torch has them elsewhere.
const uint64_t* thread_keys() {
#if defined(__linux__)
  static thread_local const auto* const words =
      static_cast<const uint64_t*>(dlsym(RTLD_DEFAULT, "_ZN3c104impl26raw_local_dispatch_key_setE"));
  return words;
#else
  return nullptr;
#endif
}

// What learn_torch fills. Never freed: Python may end first.
struct Torch {
  PyObject* const cdata = PyUnicode_InternFromString("_cdata");
  PyObject* const raw = PyUnicode_InternFromString("raw_repr");
  PyObject* const level = PyUnicode_InternFromString("_current_level");

  PyObject *tensor = nullptr, *parameter = nullptr;   // the classes
  PyObject *included = nullptr, *excluded = nullptr;  // functions: the dispatch keys of this thread
  PyObject* forward_ad = nullptr;                     // a module's dict
  std::vector<uint64_t> plain;                        // keys of tensors
  std::vector<Keys> quiet, quiet_words;           // keys of threads, as Python tells them and by thread_keys
  std::vector<PyObject*> watchers, global_hooks;  // functions; dicts
  std::vector<Own> own;
  size_t keys_at = 0;  // in a tensor's implementation; 0: unknown
};
Torch*& torch_cell() {
  static Torch* known = new Torch;
  return known;
}
const Torch& torch() {
  return *torch_cell();
}

bool is_true(py::handle value) {
  const int yes = PyObject_IsTrue(value.ptr());
  if (yes < 0) throw py::error_already_set();
  return yes;
}

uint64_t number(py::handle value) {
  const uint64_t found = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

uint64_t keys_in(const void* implementation, size_t at) {
  uint64_t keys;
  std::memcpy(&keys, static_cast<const char*>(implementation) + at, sizeof keys);
  return keys;
}

template <class T>
bool among(const std::vector<T>& known, const T& keys) {
  return std::find(known.begin(), known.end(), keys) != known.end();
}

uint64_t keys_of_thread(PyObject* asks) {
  const py::object keys = owned(PyObject_CallNoArgs(asks));
  return number(owned(PyObject_CallMethodNoArgs(keys.ptr(), torch().raw)));
}

// Whether thread_keys tells what Python tells: from one state to another the same bits change.
bool words_agree(const std::vector<Keys>& quiet, const std::vector<Keys>& words) {
  if (words.size() != quiet.size()) return false;
  for (size_t i = 1; i < quiet.size(); ++i)
    for (size_t k = 0; k < 2; ++k)
      if ((words[i][k] ^ words[0][k]) != (quiet[i][k] ^ quiet[0][k])) return false;
  return true;
}

// Where tensors have their dispatch keys. The stable ABI does not tell, and asking Python takes a quarter of
// a microsecond a tensor; so it is looked for: the place where tensors of several kinds each have the keys
// that torch says they have. No further than a c10::TensorImpl of any known torch reaches: behind it lies
// the memory of others.
size_t find_keys(const std::vector<std::pair<py::object, uint64_t>>& kinds) {
  constexpr size_t kLeast = 176;  // bytes of one
  for (size_t at = sizeof(uint64_t); at < kLeast; at += sizeof(uint64_t)) {
    const bool here = std::all_of(kinds.begin(), kinds.end(), [at](const auto& kind) {
      return keys_in(implementation(kind.first), at) == kind.second;
    });
    if (here) return at;
  }
  return 0;
}

PyObject* kept(py::handle object) {
  return object.inc_ref().ptr();
}

// space: a module, or a class.
PyObject* dict_of(py::handle space) {
  return PyType_Check(space.ptr()) ? reinterpret_cast<PyTypeObject*>(space.ptr())->tp_dict
                                   : PyModule_GetDict(space.ptr());
}

void learn_torch(py::object tensor, py::object parameter,
                 const std::vector<std::pair<py::object, uint64_t>>& kinds, std::vector<uint64_t> plain,
                 py::object included, py::object excluded, std::vector<Keys> quiet,
                 std::vector<Keys> quiet_words, const py::list& watchers, py::object forward_ad,
                 const py::list& global_hooks, const std::vector<std::pair<py::object, py::str>>& own) {
  auto learned = std::make_unique<Torch>();
  Torch& known = *learned;
  for (const auto& [space, name] : own) {
    PyObject* const interned = PyUnicode_InternFromString(std::string(name).c_str());
    const py::object value = entry(dict_of(space), interned);
    if (!value) throw py::attribute_error(name);
    known.own.push_back({kept(dict_of(space)), interned, kept(value)});
  }
  for (const py::handle asks : watchers) known.watchers.push_back(kept(asks));
  for (const py::handle hooks : global_hooks) known.global_hooks.push_back(kept(hooks));
  known.forward_ad = kept(dict_of(forward_ad));
  known.included = kept(included), known.excluded = kept(excluded);
  if (words_agree(quiet, quiet_words)) known.quiet_words = std::move(quiet_words);
  known.quiet = std::move(quiet);
  known.tensor = kept(tensor), known.parameter = kept(parameter);
  known.plain = std::move(plain), known.keys_at = find_keys(kinds);
  torch_cell() = learned.release();
}

// Calls f, a function of Python objects without exceptions of its own, at Python's lowest cost.
template <class F>
PyObject* answer(const F& f) {
  try {
    return PyBool_FromLong(f());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* is_watched(PyObject*, PyObject*) {
  return answer([] { return watched(); });
}
PyObject* are_plain(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  return answer([&] {
    return std::all_of(tensors, tensors + count, [](PyObject* t) {
      if (t == Py_None) return true;
      const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(t));
      return (type == torch().tensor || type == torch().parameter) && has_plain_keys(implementation(t));
    });
  });
}

PyMethodDef plain_functions[] = {
    {"watched", &is_watched, METH_NOARGS, "Whether something wants to see operators, or to change them."},
    {"are_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&are_plain)), METH_FASTCALL,
     "Whether tensors (or None) are torch's own, dense and on the CPU, and nothing beside."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

py::object owned(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
py::object attribute(py::handle of, PyObject* name) {
  return owned(PyObject_GetAttr(of.ptr(), name));
}
py::object entry(py::handle dict, PyObject* name) {
  if (!PyDict_Check(dict.ptr())) return {};
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(dict.ptr(), name));
}
void* implementation(py::handle tensor) {
  void* const found = PyLong_AsVoidPtr(attribute(tensor, torch().cdata).ptr());
  if (!found) throw py::error_already_set();
  return found;
}

bool watched() {
  const Torch& known = torch();
  if (!known.keys_at) return true;
  const uint64_t* const words = known.quiet_words.empty() ? nullptr : thread_keys();
  const Keys keys =
      words ? Keys{words[0], words[1]} : Keys{keys_of_thread(known.included), keys_of_thread(known.excluded)};
  if (!among(words ? known.quiet_words : known.quiet, keys)) return true;
  for (PyObject* const asks : known.watchers)
    if (is_true(owned(PyObject_CallNoArgs(asks)))) return true;
  const py::object level = entry(known.forward_ad, known.level);
  return !level || PyLong_AsLong(level.ptr()) >= 0;
}

bool has_plain_keys(const void* implementation) {
  const Torch& known = torch();
  return known.keys_at && among(known.plain, keys_in(implementation, known.keys_at));
}

void* plain_implementation(py::handle x) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) != torch().tensor) return nullptr;
  void* const found = implementation(x);
  return has_plain_keys(found) ? found : nullptr;
}

bool convolutions_are_torchs() {
  const Torch& known = torch();
  for (PyObject* const hooks : known.global_hooks)
    if (PyDict_GET_SIZE(hooks) > 0) return false;
  for (const Own& own : known.own)
    if (PyDict_GetItemWithError(own.space, own.name) != own.value) return false;
  return true;
}

SeenModule::SeenModule(py::handle module) : type_(py::type::of(module)) {
  const py::object dict = owned(PyObject_GenericGetDict(module.ptr(), nullptr));
  Py_ssize_t at = 0;
  for (PyObject *name, *value; PyDict_Next(dict.ptr(), &at, &name, &value);)
    attributes_.push_back(seen(name, value));
}

// What could lead back to the module is not kept: Python would not find the circle.
SeenModule::Attribute SeenModule::seen(PyObject* name, PyObject* value) {
  const auto plain = [](PyObject* of) {
    return of == Py_None || PyLong_Check(of) || PyFloat_CheckExact(of) || PyUnicode_CheckExact(of);
  };
  bool keeps = plain(value);
  if (PyTuple_CheckExact(value)) {
    keeps = true;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) keeps &= plain(PyTuple_GET_ITEM(value, i));
  }
  return {py::reinterpret_borrow<py::object>(name),
          keeps ? py::reinterpret_borrow<py::object>(value) : py::object(),
          PyDict_Check(value) ? PyDict_GET_SIZE(value) : -1};
}

bool SeenModule::unchanged(py::handle module) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != type_.ptr()) return false;
  const py::object dict = owned(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (PyDict_GET_SIZE(dict.ptr()) != static_cast<Py_ssize_t>(attributes_.size())) return false;
  Py_ssize_t at = 0;
  PyObject *name, *value;
  for (const Attribute& attribute : attributes_) {
    if (!PyDict_Next(dict.ptr(), &at, &name, &value) || name != attribute.name.ptr()) return false;
    if (attribute.value && value != attribute.value.ptr()) return false;
    if (attribute.entries >= 0 && !(PyDict_Check(value) && PyDict_GET_SIZE(value) == attribute.entries))
      return false;
  }
  return true;
}

void add_plain(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), plain_functions) != 0) throw py::error_already_set();
  m.def("thread_keys", [] {
    const uint64_t* const words = thread_keys();
    return words ? std::optional<Keys>({words[0], words[1]}) : std::nullopt;
  });
  m.def("learn_torch", &learn_torch, py::kw_only(), py::arg("tensor"), py::arg("parameter"), py::arg("kinds"),
        py::arg("plain"), py::arg("included"), py::arg("excluded"), py::arg("quiet"), py::arg("quiet_words"),
        py::arg("watchers"), py::arg("forward_ad"), py::arg("global_hooks"), py::arg("own"));
}

}  // namespace kegfast
