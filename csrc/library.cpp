// Every operator's schema, once. An operator is added like this:
//
//   1. here:                     m.def("short_conv(Tensor x, Tensor weight, Tensor? bias, ...) -> Tensor");
//   2. csrc/<op>/kernel.h        plain argument structs and LINCONV_KERNEL declarations (common/isa.h), no torch
//      csrc/<op>/kernel.cpp      the kernels, compiled once per instruction set
//      csrc/<op>/cpu.cpp         re-checks what it dereferences, allocates outputs, has LINCONV_PICK(kernel) run by
//                                common/tasks.h, and ends with
//                                    STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) { m.impl("short_conv", TORCH_BOX(&short_conv)); }
//   3. linconv/ops/<op>/__init__.py   registers the fake kernel and the autograd formula; reference.py has the formula.
//   4. where it runs on GPUs: csrc/<op>/cuda.cu, linconv/ops/<op>/triton.py.
//
// A backward pass that is a kernel of its own is an operator of its own, <op>_backward. All but linear_out are functional:
// no argument is written, no output aliases an input.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>

#include "common/isa.h"

STABLE_TORCH_LIBRARY(linconv, m) {
  m.def("_build_info() -> str");

  // A, D, dt_bias and states are of the math dtype; on Triton, D and dt_bias may have any. Backward results stand in the
  // order of the arguments they belong to; that of an absent one is empty.
#define SSD_ARGUMENTS                                                                                    \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "    \
  "float dt_min, float dt_max, "
#define SEQUENCES "Tensor? seq_lens, Tensor? cu_seqlens"
  m.def("ssd(" SSD_ARGUMENTS "Tensor? initial_states, " SEQUENCES ", bool reverse) -> (Tensor, Tensor)");
  m.def("ssd_backward(Tensor dy, Tensor? dfinal_states, " SSD_ARGUMENTS "Tensor? initial_states, " SEQUENCES
        ", bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("bidirectional_ssd(" SSD_ARGUMENTS "str diagonal, " SEQUENCES ") -> Tensor");
  m.def("bidirectional_ssd_backward(Tensor dy, " SSD_ARGUMENTS "str diagonal, " SEQUENCES
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#undef SSD_ARGUMENTS
#define SELECTIVE_SCAN_ARGUMENTS                                                                              \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, " \
  "Tensor? initial_states, " SEQUENCES ", bool reverse"
  m.def("selective_scan(" SELECTIVE_SCAN_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("selective_scan_backward(Tensor dy, Tensor? dfinal_states, " SELECTIVE_SCAN_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#undef SELECTIVE_SCAN_ARGUMENTS
#undef SEQUENCES

  // x (1 or directions, batch, L, channels), weight (directions, channels, width), bias (directions, channels)
  // -> (directions, batch, L, channels). Direction i runs mirrored in time if reverse != (i == 1).
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, int lookahead, Tensor? seq_lens, "
      "Tensor? cu_seqlens) -> Tensor");
  m.def(
      "short_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, int lookahead, "
      "Tensor? seq_lens, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)");

  // x, z (1 or directions, batch, L, channels), weight (directions, channels)
  // -> (directions, batch, L, channels), in memory (batch, L, directions, channels).
  m.def("gated_rms_norm(Tensor x, Tensor z, Tensor weight, float eps, int group_size, Tensor? seq_lens) -> Tensor");
  m.def(
      "gated_rms_norm_backward(Tensor grad, Tensor x, Tensor z, Tensor weight, float eps, int group_size, "
      "Tensor? seq_lens) -> (Tensor, Tensor, Tensor)");

  // short_conv, then ssd or bidirectional_ssd on its result, each on the backend that is named. Composed in Python, for every
  // device.
#define CONV_SCAN_ARGUMENTS                                                                                             \
  "Tensor xBC, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor? D, Tensor? dt_bias, int dstate, "     \
  "int ngroups, str diagonal, int lookahead, Tensor? seq_lens, str conv, str scan"
  m.def("conv_scan(" CONV_SCAN_ARGUMENTS ") -> Tensor");
  // The scan's gradients, those of x, dt, A, B, C, D and dt_bias, of which x, B and C are what the convolution makes.
  m.def("conv_scan_gradients(Tensor dy, " CONV_SCAN_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#undef CONV_SCAN_ARGUMENTS

  // student, teacher: a hidden state (batch, L, d) a layer; logits (batch, L, classes); masks bool (batch, L) or lengths
  // (batch,) -> mean squared error and mean cosine (layers,), KL (1,), and softmax statistics of each row of logits, float64.
#define GUIDANCE                                                                                            \
  "Tensor[] student, Tensor[] teacher, Tensor? mask, bool layer_norm, Tensor? student_logits, "             \
  "Tensor? teacher_logits, Tensor? logits_mask, float temperature"
  m.def("distillation_loss(" GUIDANCE ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("distillation_loss_backward(Tensor grad_errors, Tensor grad_kd, " GUIDANCE
        ", Tensor statistics, bool of_student, bool of_teacher, bool of_student_logits, bool of_teacher_logits) "
        "-> (Tensor[], Tensor[], Tensor, Tensor)");
#undef GUIDANCE
  // The KL part for (rows, classes), some of the classes at a time.
  m.def("kd_statistics(Tensor student, Tensor teacher, Tensor? before, float temperature) -> Tensor");
  m.def("kd_gradient(Tensor student, Tensor teacher, Tensor statistics, Tensor scale, float temperature) -> Tensor");
  // hidden (rows, d), weight (classes, d), mask bool (rows,) -> KL (1,), and softmax statistics of each row that counts.
#define OUTPUTS \
  "Tensor hidden_s, Tensor weight_s, Tensor hidden_t, Tensor weight_t, Tensor? mask, float temperature"
  m.def("linear_kd_loss(" OUTPUTS ") -> (Tensor, Tensor)");
  m.def("linear_kd_loss_backward(Tensor grad, " OUTPUTS ", Tensor statistics) -> (Tensor, Tensor)");
#undef OUTPUTS
  // x (rows, d), weight (columns, d), bias (columns,), factor of the bias (rows,) -> (rows, columns).
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? factor) -> Tensor");
  // Into memory of the math dtype, or added to what is there.
  m.def("linear_out(Tensor(a!) out, Tensor x, Tensor weight, bool add) -> ()");
  // x (batch, heads, L, headdim), proj (1 or heads, Lmax, r) -> (batch, heads, r, headdim) in the math dtype; q as x,
  // k, v (batch, heads, r, headdim) -> as q. What is shaped as x is in memory (batch, L, heads, headdim).
  m.def("linformer_project(Tensor x, Tensor proj, bool normalize, Tensor? seq_lens) -> Tensor");
  m.def(
      "linformer_project_backward(Tensor grad, Tensor x, Tensor proj, bool normalize, Tensor? seq_lens) "
      "-> (Tensor, Tensor)");
  m.def(
      "linformer_attend(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, Tensor? seq_lens) "
      "-> Tensor");
  m.def(
      "linformer_attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, "
      "Tensor? seq_lens) -> (Tensor, Tensor, Tensor)");
  // hidden (batch, L, d), weights (width, d), biases (width,), projections (1, Lmax, r) -> (batch, L, width); no gradients.
  m.def(
      "linformer_self_attention(Tensor hidden, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor wv, Tensor? bv, "
      "Tensor proj_k, Tensor? proj_v, int num_heads, float scale, bool normalize, Tensor? seq_lens) -> Tensor");
}

namespace linconv {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

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
    const auto& [name, supported] = list.items[i];
    available += (i ? ", " : "") + quoted(isa_name(name)) + ": " + (supported ? "true" : "false");
  }
  return "{\"version\": " + quoted(LINCONV_VERSION) + ", \"torch\": " + quoted(TORCH_VERSION) +
         ", \"compiler\": " + quoted(kCompiler) + ", \"isa\": " + chosen + ", \"isa_error\": " + error +
         ", \"isas\": {" + available + "}, \"cuda\": " + quoted(LINCONV_CUDA_STATUS) +
         ", \"cuda_architectures\": " + quoted(LINCONV_CUDA_BUILT) + "}";
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&linconv::build_info));
}
