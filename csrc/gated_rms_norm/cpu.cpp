#include "gated_rms_norm/kernel.h"

#include <tuple>

#include "common/tasks.h"
#include "common/tensor.h"

namespace linconv {
namespace {

constexpr int64_t kOperations = 32;  // of a channel of a frame, about

// The arguments both passes share, re-checked; `blocks` must outlive them.
NormArgs arguments(const Tensor& x, const Tensor& z, const Tensor& weight, double eps, int64_t group_size,
                   const std::optional<Tensor>& seq_lens, std::vector<Block>& blocks) {
  NormArgs a{};
  a.x = view<4>(x, "x");
  a.z = view<4>(z, "z");
  a.weight = view<2>(weight, "weight");
  a.directions = a.weight.size[0];
  a.channels = a.weight.size[1];
  a.group_size = group_size;
  a.eps = eps;
  const int64_t batch = a.x.size[1], frames = a.x.size[2];
  require(a.directions >= 1, "weight has no directions, wanted at least 1");
  require(group_size >= 1 && a.channels % group_size == 0, "group_size is ", group_size, ", wanted a divisor of ", a.channels);
  require_sizes(a.x, {a.x.size[0] == 1 ? 1 : a.directions, batch, frames, a.channels}, "x");
  require_sizes(a.z, {a.z.size[0] == 1 ? 1 : a.directions, batch, frames, a.channels}, "z");
  blocks = cut_into_blocks(sequence_spans(seq_lens, std::nullopt, batch, frames), frames, kNormFrames);
  a.blocks = blocks.data();
  a.block_count = static_cast<int64_t>(blocks.size());
  return a;
}

Tensor gated_rms_norm(Tensor x, Tensor z, Tensor weight, double eps, int64_t group_size, std::optional<Tensor> seq_lens) {
  std::vector<Block> blocks;
  NormArgs a = arguments(x, z, weight, eps, group_size, seq_lens, blocks);
  // In memory (batch, L, directions, channels): a frame's directions side by side, as one projection of both reads them.
  Tensor y = empty({a.x.size[1], a.x.size[2], a.directions, a.channels}, a.x.dtype);
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 2), 0, 1);
  a.y = view<4>(y, "y");
  const auto forward = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(norm_scratch(a));
    LINCONV_PICK(gated_rms_norm_forward)(a, scratch.data(), begin, end);
  };
  run({a.block_count, forward, kOperations * y.numel()});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(Tensor grad, Tensor x, Tensor z, Tensor weight, double eps,
                                                           int64_t group_size, std::optional<Tensor> seq_lens) {
  std::vector<Block> blocks;
  NormArgs a = arguments(x, z, weight, eps, group_size, seq_lens, blocks);
  a.grad_y = view<4>(grad, "grad");
  require_sizes(a.grad_y, {a.directions, a.x.size[1], a.x.size[2], a.channels}, "grad");
  Tensor grad_x = empty({a.x.size[0], a.x.size[1], a.x.size[2], a.channels}, a.x.dtype);
  Tensor grad_z = empty({a.z.size[0], a.z.size[1], a.z.size[2], a.channels}, a.z.dtype);
  Tensor grad_weight = empty({a.directions, a.channels}, a.weight.dtype);
  Tensor partial = empty({a.block_count, a.directions, a.channels}, math_type(a.x.dtype));
  a.grad_x = view<4>(grad_x, "grad_x");
  a.grad_z = view<4>(grad_z, "grad_z");
  a.grad_weight = view<2>(grad_weight, "grad_weight");
  a.partial = partial.data_ptr();
  const auto backward = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(norm_scratch(a));
    LINCONV_PICK(gated_rms_norm_backward)(a, scratch.data(), begin, end);
  };
  run({a.block_count, backward, 2 * kOperations * grad.numel()});
  run({a.channels, [&](int64_t begin, int64_t end) { LINCONV_PICK(gated_rms_norm_reduce)(a, begin, end); }, partial.numel()});
  return {grad_x, grad_z, grad_weight};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&linconv::gated_rms_norm));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&linconv::gated_rms_norm_backward));
}
