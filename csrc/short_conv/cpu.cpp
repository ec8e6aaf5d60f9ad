#include "short_conv/kernel.h"

#include <tuple>

#include "common/tasks.h"
#include "common/tensor.h"

namespace linconv {
namespace {

constexpr int64_t kOperations = 32;  // of a channel of a frame, about

// The arguments both passes share, re-checked; `blocks` must outlive them.
ConvArgs arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool silu, bool reverse,
                   int64_t lookahead, const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens,
                   std::vector<Block>& blocks) {
  ConvArgs a{};
  a.x = view<4>(x, "x");
  a.weight = view<3>(weight, "weight");
  a.bias = view<2>(bias, "bias");
  a.directions = a.weight.size[0];
  a.channels = a.weight.size[1];
  a.width = a.weight.size[2];
  a.lookahead = lookahead;
  a.reverse = reverse;
  a.silu = silu;
  a.shared = a.x.size[0] == 1;
  const int64_t batch = a.x.size[1], frames = a.x.size[2];
  require(a.directions == 1 || a.directions == 2, "weight has ", a.directions, " directions, wanted 1 or 2");
  require(a.width >= 2 && a.width <= kMaxConvWidth, "weight has width ", a.width, ", wanted 2 to ", kMaxConvWidth);
  require(lookahead >= 0 && lookahead < a.width, "lookahead is ", lookahead, ", wanted 0 to width - 1 = ", a.width - 1);
  require_sizes(a.x, {a.shared ? 1 : a.directions, batch, frames, a.channels}, "x");
  if (bias) require_sizes(a.bias, {a.directions, a.channels}, "bias");
  blocks = cut_into_blocks(sequence_spans(seq_lens, cu_seqlens, batch, frames), frames, kConvFrames);
  a.blocks = blocks.data();
  a.block_count = static_cast<int64_t>(blocks.size());
  a.channel_blocks = (a.channels + kConvChannels - 1) / kConvChannels;
  return a;
}

Tensor short_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, bool silu, bool reverse, int64_t lookahead,
                  std::optional<Tensor> seq_lens, std::optional<Tensor> cu_seqlens) {
  std::vector<Block> blocks;
  ConvArgs a = arguments(x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens, blocks);
  Tensor y = empty({a.directions, a.x.size[1], a.x.size[2], a.channels}, a.x.dtype);
  a.y = view<4>(y, "y");
  const int64_t tasks = a.block_count * a.channel_blocks;
  run({tasks, [&](int64_t begin, int64_t end) { LINCONV_PICK(short_conv_forward)(a, begin, end); },
       kOperations * y.numel()});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> short_conv_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                       bool silu, bool reverse, int64_t lookahead,
                                                       std::optional<Tensor> seq_lens, std::optional<Tensor> cu_seqlens) {
  std::vector<Block> blocks;
  ConvArgs a = arguments(x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens, blocks);
  a.grad_y = view<4>(grad, "grad");
  require_sizes(a.grad_y, {a.directions, a.x.size[1], a.x.size[2], a.channels}, "grad");
  Tensor grad_x = empty({a.x.size[0], a.x.size[1], a.x.size[2], a.channels}, a.x.dtype);
  Tensor grad_weight = empty({a.directions, a.channels, a.width}, a.weight.dtype);
  Tensor grad_bias = empty({a.directions, a.channels}, bias ? a.bias.dtype : a.weight.dtype);
  Tensor partial = empty({a.block_count, a.directions, a.width + 1, a.channels}, math_type(a.x.dtype));
  a.grad_x = view<4>(grad_x, "grad_x");
  a.grad_weight = view<3>(grad_weight, "grad_weight");
  a.grad_bias = view<2>(grad_bias, "grad_bias");
  a.partial = partial.data_ptr();
  run({a.block_count * a.channel_blocks,
       [&](int64_t begin, int64_t end) { LINCONV_PICK(short_conv_backward)(a, begin, end); }, 2 * kOperations * grad.numel()});
  run({a.channel_blocks, [&](int64_t begin, int64_t end) { LINCONV_PICK(short_conv_reduce)(a, begin, end); }, partial.numel()});
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&linconv::short_conv));
  m.impl("short_conv_backward", TORCH_BOX(&linconv::short_conv_backward));
}
