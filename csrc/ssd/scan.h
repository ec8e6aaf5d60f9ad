// The scan between torch's tensors and the kernels, for one direction (ssd) and both (bidirectional_ssd).
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "ssd/kernel.h"

namespace linconv {

// x, dt, B, C, A, D and dt_bias may carry a leading axis of 2 where there are two directions. A, D, dt_bias and the states
// are of the math dtype of x.
struct Scan {
  Tensor x, dt, A, B, C;
  std::optional<Tensor> D, dt_bias;
  bool dt_softplus;
  double dt_min, dt_max;
  std::optional<Tensor> initial_states, seq_lens, cu_seqlens;
  int directions;
  SsdDirection direction[2];
  bool shifted;
};

// y as x, and the last states (sequences, heads, headdim, dstate).
std::tuple<Tensor, Tensor> scan_forward(const Scan& scan);

// Gradients of x, dt, A, B, C, D, dt_bias and initial_states, each as its argument; an absent argument's is empty.
using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ScanGradients scan_backward(const Scan& scan, const Tensor& dy, const std::optional<Tensor>& dfinal_states);

}  // namespace linconv
