// pybind11 module _C: what the library was built with and the knobs of its kernels. Tensors never pass
// through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/isa.h"
#include "cpu/peak.h"
#include "diversity.h"
#include "tucker2.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["isa_compiled"] = kegfast::compiled_isas();
  info["isa_detected"] = kegfast::isa_name(kegfast::detected_isa());
  info["isa_active"] = kegfast::isa_name(kegfast::active_isa());
  return info;
}

// Vector instructions a second over about a millisecond of nothing else.
double vector_issue_rate() {
  const auto start = std::chrono::steady_clock::now();
  const int64_t issued = KEGFAST_SELECT(issue_vectors)(1 << 20);
  return static_cast<double>(issued) /
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kegfast's native part: build facts and kernel knobs; operators live in torch.ops.kegfast";
  m.def("build_info", &build_info);
  py::enum_<kegfast::L1Kernel>(m, "L1Kernel")
      .value("automatic", kegfast::L1Kernel::automatic)
      .value("sort", kegfast::L1Kernel::sort)
      .value("pairs", kegfast::L1Kernel::pairs);
  m.def("vector_issue_rate", &vector_issue_rate);
  m.def("force_l1_kernel", &kegfast::force_l1_kernel, py::arg("kernel"));
  m.def("tucker2_winograd", &kegfast::tucker2_winograd);
  m.def("set_tucker2_winograd", &kegfast::set_tucker2_winograd, py::arg("allowed"));
  m.def("last_kernel", &kegfast::last_kernel);
  m.def("note_unfused", &kegfast::note_unfused);
  m.def(
      "set_isa", [](const std::string& name) { return kegfast::isa_name(kegfast::set_isa(name)); },
      py::arg("name"));
}
