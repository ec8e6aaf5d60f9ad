// Every operator's schema, once. An operator is added like this:
//
//   1. here:                     m.def("short_conv(Tensor x, Tensor weight, Tensor? bias, ...) -> Tensor");
//   2. csrc/<op>/kernel.h        plain argument structs and LINCONV_KERNEL declarations (common/isa.h), no torch
//      csrc/<op>/kernel.cpp      the kernels, compiled once per instruction set
//      csrc/<op>/cpu.cpp         re-checks what it dereferences, allocates outputs, runs LINCONV_PICK(kernel) under
//                                torch::stable::parallel_for, and ends with
//                                    STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) { m.impl("short_conv", TORCH_BOX(&short_conv)); }
//   3. linconv/ops/<op>/__init__.py   registers the fake kernel and the autograd formula.
//
// A backward pass that is a kernel of its own is an operator of its own, <op>_backward. All are functional: no argument is
// written, no output aliases an input.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"

STABLE_TORCH_LIBRARY(linconv, m) {
  m.def("_build_info() -> str");
}

namespace linconv {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

// JSON: what linconv/ops/dispatch.py needs to judge this binary, and what `linconv env` prints.
std::string build_info() {
  std::string chosen = "null", error = "null", available;
  try {
    chosen = quoted(isa_name(isa()));
  } catch (const std::runtime_error& e) {
    error = quoted(e.what());
  }
  const IsaList list = isas();
  for (int i = 0; i < list.count; ++i) {
    available += (i ? ", " : "") + quoted(isa_name(list.items[i].isa)) + ": " + (list.items[i].supported ? "true" : "false");
  }
  return "{\"version\": " + quoted(LINCONV_VERSION) + ", \"torch\": " + quoted(TORCH_VERSION) + ", \"compiler\": " +
         quoted(__VERSION__) + ", \"isa\": " + chosen + ", \"isa_error\": " + error + ", \"isas\": {" + available + "}}";
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&linconv::build_info));
}
