// Both directions of the scan: csrc/ssd with two entries in its list of directions.
#include "ssd/scan.h"

namespace linconv {
namespace {

using Optional = const std::optional<Tensor>&;

Scan both_directions(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
                     Optional dt_bias, bool dt_softplus, double dt_min, double dt_max, const std::string& diagonal,
                     Optional seq_lens, Optional cu_seqlens) {
  require(diagonal == "both" || diagonal == "once" || diagonal == "shifted", "diagonal is '", diagonal,
          "', wanted 'both', 'once' or 'shifted'");
  return {x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, std::nullopt, seq_lens, cu_seqlens,
          2, {{false, false}, {true, diagonal == "once"}}, diagonal == "shifted"};
}

Tensor bidirectional_ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
                         Optional dt_bias, bool dt_softplus, double dt_min, double dt_max, const std::string& diagonal,
                         Optional seq_lens, Optional cu_seqlens) {
  return std::get<0>(scan_forward(both_directions(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, diagonal,
                                                  seq_lens, cu_seqlens)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_ssd_backward(
    const Tensor& dy, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
    Optional dt_bias, bool dt_softplus, double dt_min, double dt_max, const std::string& diagonal, Optional seq_lens,
    Optional cu_seqlens) {
  auto [dx, ddt, dA, dB, dC, dD, ddt_bias, _] =
      scan_backward(both_directions(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, diagonal, seq_lens, cu_seqlens),
                    dy, std::nullopt);
  return {dx, ddt, dA, dB, dC, dD, ddt_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("bidirectional_ssd", TORCH_BOX(&bidirectional_ssd));
  m.impl("bidirectional_ssd_backward", TORCH_BOX(&bidirectional_ssd_backward));
}

}  // namespace linconv
