#include "linear/product.h"

#include <utility>

namespace linconv {

Product::Product(const View<2>& x, const View<2>& weight, const View<1>& bias, const View<1>& factor, const View<2>& out)
    : fp64(x.dtype == DType::kFloat64) {
  const int64_t rows = x.size[0], columns = weight.size[0], depth = x.size[1];
  const DType math = math_type(x.dtype);
  require_sizes(weight, {columns, depth}, "weight");
  require_sizes(out, {rows, columns}, "out");
  require(math_type(weight.dtype) == math, "x and weight: wanted both or none in Double");
  const bool biased = bias.data != nullptr, scaled = biased && factor.data != nullptr;
  if (biased) {
    require_sizes(bias, {columns}, "bias");
    require(math_type(bias.dtype) == math, "x and bias: wanted both or none in Double");
  }
  if (scaled) {
    require_sizes(factor, {rows}, "factor");
    require(math_type(factor.dtype) == math, "x and factor: wanted both or none in Double");
  }
  const View<1> absent{};
  args = {x, weight, scaled ? factor : absent, bias, out, nullptr, rows, columns, depth};
  if (rows < columns) {
    std::swap(args.left, args.right);
    std::swap(args.of_rows, args.of_columns);
    std::swap(args.rows, args.columns);
    args.out = {out.data, out.dtype, {columns, rows}, {out.stride[1], out.stride[0]}};
  }
  packed = empty({linear_packed(args.columns, args.depth)}, math);
  args.packed = packed.data_ptr();
}

Tasks Product::pack() const {
  const int64_t tasks = (args.columns + kLinearPacked - 1) / kLinearPacked;
  return {tasks, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear_pack)(a, fp64, begin, end); },
          grain(tasks, args.columns * args.depth)};
}

Tasks Product::multiply() const {
  const int64_t tasks = args.row_blocks() * args.column_blocks();
  return {tasks, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear)(a, fp64, begin, end); },
          grain(tasks, args.rows * args.columns * args.depth)};
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
