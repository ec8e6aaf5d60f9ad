#include "linear/kernel.h"

#include "common/tensor.h"

namespace linconv {
namespace {

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> factor) {
  LinearArgs a{};
  a.x = view<2>(x, "x");
  a.weight = view<2>(weight, "weight");
  a.bias = view<1>(bias, "bias");
  a.factor = view<1>(factor, "factor");
  a.rows = a.x.size[0], a.columns = a.weight.size[0], a.depth = a.x.size[1];
  require_sizes(a.weight, {a.columns, a.depth}, "weight");
  if (bias) require_sizes(a.bias, {a.columns}, "bias");
  if (factor) require_sizes(a.factor, {a.rows}, "factor");
  const DType math = math_type(a.x.dtype);
  const bool fp64 = math == DType::kFloat64;
  const auto as_x = [&](DType dtype) { return math_type(dtype) == math; };
  require(as_x(a.weight.dtype) && (!bias || as_x(a.bias.dtype)) && (!factor || as_x(a.factor.dtype)),
          "x, weight, bias and factor: wanted all or none in Double");
  Tensor out = empty({a.rows, a.columns}, a.x.dtype), packed = empty({linear_packed(a.columns, a.depth)}, math);
  a.out = view<2>(out, "out");
  a.packed = packed.data_ptr();
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  if (a.rows == 0) return out;
  torch::stable::parallel_for(0, blocks(a.columns, kLinearPacked), 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linear_pack)(a, fp64, begin, end);
  });
  torch::stable::parallel_for(0, blocks(a.rows, kLinearRows) * a.column_blocks(), 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linear)(a, fp64, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) { m.impl("linear", TORCH_BOX(&linconv::linear)); }
