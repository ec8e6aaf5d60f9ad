#include "linear/product.h"

namespace linconv {

Product::Product(const View<2>& x, const View<2>& weight, const View<1>& bias, const View<1>& factor, const View<2>& out)
    : fp64(x.dtype == DType::kFloat64) {
  args = {x, weight, bias, factor, out, nullptr, x.size[0], weight.size[0], x.size[1]};
  const DType math = math_type(x.dtype);
  require_sizes(weight, {args.columns, args.depth}, "weight");
  require_sizes(out, {args.rows, args.columns}, "out");
  require(math_type(weight.dtype) == math, "x and weight: wanted both or none in Double");
  if (bias.data != nullptr) {
    require_sizes(bias, {args.columns}, "bias");
    require(math_type(bias.dtype) == math, "x and bias: wanted both or none in Double");
  }
  if (factor.data != nullptr) {
    require_sizes(factor, {args.rows}, "factor");
    require(math_type(factor.dtype) == math, "x and factor: wanted both or none in Double");
  }
  packed = empty({linear_packed(args.columns, args.depth)}, math);
  args.packed = packed.data_ptr();
}

Tasks Product::pack() const {
  const int64_t count = args.rows == 0 ? 0 : (args.columns + kLinearPacked - 1) / kLinearPacked;
  return {count, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear_pack)(a, fp64, begin, end); }};
}

Tasks Product::multiply() const {
  const int64_t count = (args.rows + kLinearRows - 1) / kLinearRows * args.column_blocks();
  return {count, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear)(a, fp64, begin, end); }};
}

namespace {

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> factor) {
  Tensor out = empty({view<2>(x, "x").size[0], view<2>(weight, "weight").size[0]}, dtype_of(x, "x"));
  const Product product(view<2>(x, "x"), view<2>(weight, "weight"), view<1>(bias, "bias"), view<1>(factor, "factor"), view<2>(out, "out"));
  run(product.pack());
  run(product.multiply());
  return out;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) { m.impl("linear", TORCH_BOX(&linconv::linear)); }
