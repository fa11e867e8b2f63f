// pybind11 module _C: what the library was built with and the knobs of its kernels. Tensors never pass
// through here, but for repeated calls of nn.TuckerConv2d (tucker2_repeat.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "cpu/isa.h"
#include "cpu/peak.h"
#include "diversity.h"
#include "frozen.h"
#include "plain.h"
#include "tucker2.h"
#include "tucker2_repeat.h"

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
  if (const std::string left_out = kegfast::isas_left_out(); !left_out.empty())
    info["isa_left_out"] = left_out + ": the compiler does not know it";
  info["isa_detected"] = kegfast::isa_name(kegfast::detected_isa());
  info["isa_active"] = kegfast::isa_name(kegfast::active_isa());
  return info;
}

// What `issue` counts, a second, over about a millisecond of nothing else.
double rate_of(int64_t (*issue)(int64_t)) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t issued = issue(1 << 20);
  return static_cast<double>(issued) /
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double vector_issue_rate() {
  return rate_of(KEGFAST_SELECT(issue_vectors));
}
double multiply_add_rate(bool bfloat16) {
#if defined(KEGFAST_HAS_AVX512_BF16)
  if (bfloat16 && kegfast::active_isa() >= kegfast::Isa::avx512_bf16)
    return rate_of(KEGFAST_SELECT_BF16(issue_pair_multiply_adds));
#endif
  (void)bfloat16;
  return rate_of(KEGFAST_SELECT(issue_multiply_adds));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kegfast's native part: build facts and kernel knobs; operators live in torch.ops.kegfast";
  kegfast::add_plain(m);
  kegfast::add_tucker2_repeat(m);
  kegfast::add_frozen(m);
  m.def("build_info", &build_info);
  py::enum_<kegfast::L1Kernel>(m, "L1Kernel")
      .value("automatic", kegfast::L1Kernel::automatic)
      .value("sort", kegfast::L1Kernel::sort)
      .value("pairs", kegfast::L1Kernel::pairs);
  m.def("vector_issue_rate", &vector_issue_rate);
  m.def("multiply_add_rate", &multiply_add_rate, py::arg("bfloat16") = false);
  m.def("force_l1_kernel", &kegfast::force_l1_kernel, py::arg("kernel"));
  m.def("tucker2_winograd", &kegfast::tucker2_winograd);
  m.def("set_tucker2_winograd", &kegfast::set_tucker2_winograd, py::arg("most"));
  py::enum_<kegfast::Tucker2Form>(m, "Tucker2Form")
      .value("automatic", kegfast::Tucker2Form::automatic)
      .value("direct", kegfast::Tucker2Form::direct)
      .value("winograd", kegfast::Tucker2Form::winograd);
  // (N, C, H, W, R1, R2, K, kernel, stride, padding, dilation, channels_last, threads), pairs as two ints
  m.def("choose_tucker2", &kegfast::choose_tucker2, py::arg("shape"), py::arg("form"));
  m.def("last_kernel", &kegfast::last_kernel);
  m.def("note_unfused", &kegfast::note_unfused);
  m.def(
      "set_isa", [](const std::string& name) { return kegfast::isa_name(kegfast::set_isa(name)); },
      py::arg("name"));
}
