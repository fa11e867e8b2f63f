#pragma once

#include <pybind11/pybind11.h>

namespace kegfast {

void add_frozen(pybind11::module_& m);  // to _C

}  // namespace kegfast
