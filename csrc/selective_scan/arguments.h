// What cpu.cpp and cuda.cu share: the selective scan's tensors as views, re-checked.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace linconv {

struct SelectiveScanTensors {
  Tensor x, dt, A, B, C;
  std::optional<Tensor> D, z, dt_bias, initial_states;
};

// B or C by group: (groups, batch, L, dstate) of (batch, L, groups, dstate).
inline View<4> by_group(const View<4>& view) {
  View<4> out = view;
  const int order[4] = {2, 0, 1, 3};
  for (int i = 0; i < 4; ++i) out.size[i] = view.size[order[i]], out.stride[i] = view.stride[order[i]];
  return out;
}

// Frames as (1, batch, L, channels).
inline View<4> frames_view(const Tensor& tensor, const char* name) {
  const View<3> from = view<3>(tensor, name);
  View<4> out;
  out.data = from.data;
  out.dtype = from.dtype;
  out.size[0] = 1;
  for (int i = 0; i < 3; ++i) out.size[i + 1] = from.size[i], out.stride[i + 1] = from.stride[i];
  return out;
}
inline View<4> frames_view(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? frames_view(*tensor, name) : View<4>{};
}

// Fills the members of that name; everything but where sequences lie.
template <class Args>
void set_tensors(Args& a, const SelectiveScanTensors& t) {
  a.x = frames_view(t.x, "x");
  a.dt = frames_view(t.dt, "dt");
  a.z = frames_view(t.z, "z");
  a.A = view<2>(t.A, "A");
  const View<4> B = view<4>(t.B, "B"), C = view<4>(t.C, "C");
  a.D = view<1>(t.D, "D");
  a.dt_bias = view<1>(t.dt_bias, "dt_bias");
  const int64_t batch = a.x.size[1];
  a.frames = a.x.size[2];
  a.channels = a.x.size[3];
  a.groups = B.size[2];
  a.dstate = B.size[3];
  require(1 <= a.dstate && a.dstate <= 256, "dstate is ", a.dstate, ", wanted 1 to 256");
  require(a.groups > 0 && a.channels % a.groups == 0, "B has ", a.groups, " groups, wanted a divisor of the ", a.channels,
          " channels of x");
  require_sizes(a.dt, {1, batch, a.frames, a.channels}, "dt");
  if (t.z) require_sizes(a.z, {1, batch, a.frames, a.channels}, "z");
  require_sizes(a.A, {a.channels, a.dstate}, "A");
  require_sizes(B, {batch, a.frames, a.groups, a.dstate}, "B");
  require_sizes(C, {batch, a.frames, a.groups, a.dstate}, "C");
  if (t.D) require_sizes(a.D, {a.channels}, "D");
  if (t.dt_bias) require_sizes(a.dt_bias, {a.channels}, "dt_bias");
  const DType math = math_type(a.x.dtype);
  require(a.A.dtype == math, "A is not of the math dtype");
  require(!t.D || a.D.dtype == math, "D is not of the math dtype");
  require(!t.dt_bias || a.dt_bias.dtype == math, "dt_bias is not of the math dtype");
  a.B = by_group(B);
  a.C = by_group(C);
}

// States (sequences, channels, dstate) in the math dtype, or none.
inline View<3> states_view(const std::optional<Tensor>& tensor, int64_t sequences, int64_t channels, int64_t dstate, DType math,
                           const char* name) {
  const View<3> out = view<3>(tensor, name);
  if (tensor) require_sizes(out, {sequences, channels, dstate}, name);
  require(!tensor || out.dtype == math, name, " is not of the math dtype");
  return out;
}

}  // namespace linconv
