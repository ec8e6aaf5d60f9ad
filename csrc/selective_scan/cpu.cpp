#include <algorithm>
#include <tuple>

#include "common/sums.h"
#include "common/tasks.h"
#include "selective_scan/arguments.h"
#include "selective_scan/kernel.h"

namespace linconv {
namespace {

constexpr int64_t kOperations = 24;  // of an entry of the state, a frame, about

using Optional = const std::optional<Tensor>&;

// The arguments both passes share; `spans` must outlive them.
SelectiveScanArgs arguments(const SelectiveScanTensors& tensors, bool dt_softplus, Optional seq_lens, Optional cu_seqlens,
                            bool reverse, std::vector<Span>& spans) {
  SelectiveScanArgs a{};
  set_tensors(a, tensors);
  const DType math = math_type(a.x.dtype);
  require_math(tensors.dt, math, "dt");
  require_math(tensors.B, math, "B");
  require_math(tensors.C, math, "C");
  if (tensors.z) require_math(*tensors.z, math, "z");
  spans = sequence_spans(seq_lens, cu_seqlens, a.x.size[1], a.frames);
  a.spans = spans.data();
  a.sequences = static_cast<int64_t>(spans.size());
  a.packed = cu_seqlens.has_value();
  a.dt_softplus = dt_softplus;
  a.reverse = reverse;
  a.initial_states = states_view(tensors.initial_states, a.sequences, a.channels, a.dstate, math, "initial_states");
  a.block = std::min(kSelectiveChannels, a.group_channels());
  return a;
}

// Smaller blocks where there are fewer than the threads want: every channel is computed alike in any.
void cut_for_threads(SelectiveScanArgs& a) {
  constexpr int64_t kSmallest = 16;
  const int64_t threads = torch::stable::get_num_threads();
  while (a.block > kSmallest && a.tasks() % threads != 0 && a.tasks() < 4 * threads) a.block = (a.block + 1) / 2;
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                          const Tensor& C, Optional D, Optional z, Optional dt_bias, bool dt_softplus,
                                          Optional initial_states, Optional seq_lens, Optional cu_seqlens, bool reverse) {
  std::vector<Span> spans;
  SelectiveScanArgs a =
      arguments({x, dt, A, B, C, D, z, dt_bias, initial_states}, dt_softplus, seq_lens, cu_seqlens, reverse, spans);
  Tensor y = empty_as(x, a.x.dtype);
  Tensor final_states = empty({a.sequences, a.channels, a.dstate}, math_type(a.x.dtype));
  a.y = frames_view(y, "y");
  a.final_states = view<3>(final_states, "final_states");
  if (a.channels > 0) {
    cut_for_threads(a);
    run({a.tasks(), [&](int64_t begin, int64_t end) { LINCONV_PICK(selective_scan_forward)(a, begin, end); },
         kOperations * x.numel() * a.dstate});
  }
  return {y, final_states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(const Tensor& dy, Optional dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
                                  const Tensor& B, const Tensor& C, Optional D, Optional z, Optional dt_bias,
                                  bool dt_softplus, Optional initial_states, Optional seq_lens, Optional cu_seqlens,
                                  bool reverse) {
  std::vector<Span> spans;
  SelectiveScanArgs a =
      arguments({x, dt, A, B, C, D, z, dt_bias, initial_states}, dt_softplus, seq_lens, cu_seqlens, reverse, spans);
  const DType math = math_type(a.x.dtype);
  const int64_t batch = a.x.size[1];
  a.dy = frames_view(dy, "dy");
  require_sizes(a.dy, {1, batch, a.frames, a.channels}, "dy");
  a.dfinal_states = states_view(dfinal_states, a.sequences, a.channels, a.dstate, math, "dfinal_states");
  const std::initializer_list<int64_t> none{0};
  Tensor dx = empty_as(x, a.x.dtype), ddt = empty_as(dt, a.dt.dtype);
  Tensor dz = z ? empty_as(*z, a.z.dtype) : empty(none, math);
  Tensor dinitial = initial_states ? empty_as(*initial_states, a.initial_states.dtype) : empty(none, math);
  a.dx = frames_view(dx, "dx");
  a.ddt = frames_view(ddt, "ddt");
  if (z) a.dz = frames_view(dz, "dz");
  if (initial_states) a.dinitial_states = view<3>(dinitial, "dinitial_states");
  const int64_t blocks = a.channels > 0 ? a.group_blocks() : 0;
  Tensor dA = empty({a.sequences, a.channels, a.dstate}, math);
  Tensor dD = empty({a.sequences, a.channels}, math), ddt_bias = empty({a.sequences, a.channels}, math);
  Tensor dB = empty({blocks, batch, a.frames, a.groups, a.dstate}, math);
  Tensor dC = empty({blocks, batch, a.frames, a.groups, a.dstate}, math);
  a.dA = dA.mutable_data_ptr();
  a.dD = D ? dD.mutable_data_ptr() : nullptr;
  a.ddt_bias = dt_bias ? ddt_bias.mutable_data_ptr() : nullptr;
  a.dB = dB.mutable_data_ptr();
  a.dC = dC.mutable_data_ptr();
  if (blocks > 0)
    run({a.tasks(), [&](int64_t begin, int64_t end) { LINCONV_PICK(selective_scan_backward)(a, begin, end); }});
  return {dx,
          ddt,
          sum_of_parts(dA, A, "A", a.sequences, A.numel()),
          sum_of_parts(dB, B, "B", blocks, B.numel()),
          sum_of_parts(dC, C, "C", blocks, C.numel()),
          D ? sum_of_parts(dD, *D, "D", a.sequences, D->numel()) : empty(none, math),
          dz,
          dt_bias ? sum_of_parts(ddt_bias, *dt_bias, "dt_bias", a.sequences, dt_bias->numel()) : empty(none, math),
          dinitial};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&linconv::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&linconv::selective_scan_backward));
}
