// pybind11 module _C: what the library was built with and the knobs of its kernels. Tensors never pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "diversity.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kegfast's native part: build facts and kernel knobs; operators live in torch.ops.kegfast";
  m.def("build_info", &build_info);
  py::enum_<kegfast::L1Kernel>(m, "L1Kernel")
      .value("automatic", kegfast::L1Kernel::automatic)
      .value("sort", kegfast::L1Kernel::sort)
      .value("pairs", kegfast::L1Kernel::pairs);
  m.def("force_l1_kernel", &kegfast::force_l1_kernel, py::arg("kernel"));
  m.def("set_isa", [](const std::string& name) { return kegfast::isa_name(kegfast::set_isa(name)); }, py::arg("name"));
}
