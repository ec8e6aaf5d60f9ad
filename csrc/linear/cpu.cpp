#include "linear/product.h"

#include <algorithm>
#include <utility>

namespace linconv {
namespace {

View<2> transposed(const View<2>& view) {
  return {view.data, view.dtype, {view.size[1], view.size[0]}, {view.stride[1], view.stride[0]}};
}

}  // namespace

Product::Product(const View<2>& x, const View<2>& weight, const View<1>& bias, const View<1>& factor, const View<2>& out,
                 const View<2>& sums)
    : fp64(x.dtype == DType::kFloat64) {
  const int64_t rows = x.size[0], columns = weight.size[0], depth = x.size[1];
  const DType math = math_type(x.dtype);
  require_sizes(weight, {columns, depth}, "weight");
  require_sizes(out, {rows, columns}, "out");
  if (sums.data != nullptr) require_sizes(sums, {rows, columns}, "sums");
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
  args = {x, weight, scaled ? factor : absent, bias, sums, out, nullptr, rows, columns, depth};
  if (rows < columns) {
    std::swap(args.left, args.right);
    std::swap(args.of_rows, args.of_columns);
    std::swap(args.rows, args.columns);
    args.sums = transposed(sums);
    args.out = transposed(out);
  }
  packed = empty({linear_packed(args.columns, args.depth)}, math);
  args.packed = packed.data_ptr();
}

Tasks Product::pack() const {
  const int64_t tasks = (args.columns + kLinearPacked - 1) / kLinearPacked;
  return {tasks, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear_pack)(a, fp64, begin, end); },
          args.columns * args.depth};
}

Tasks Product::multiply() const {
  const int64_t tasks = args.row_blocks() * args.column_blocks();
  return {tasks, [a = args, fp64 = fp64](int64_t begin, int64_t end) { LINCONV_PICK(linear)(a, fp64, begin, end); },
          args.rows * args.columns * args.depth};
}

namespace {

// The columns of a matrix from `first` on, at most so many.
View<2> columns_of(View<2> view, int64_t first, int64_t count) {
  view.data = at(view, 0, first);
  view.size[1] = std::min(count, view.size[1] - first);
  return view;
}

using Optional = std::optional<Tensor>;

// What is deeper than caches hold panels for is summed from one block of the depth to the next, in `sums`, (rows, columns) of
// the math type, which may be out. With `add`, so is what is in it before.
void multiply(const View<2>& x, const View<2>& weight, const View<1>& bias, const View<1>& factor, const View<2>& sums,
              const View<2>& out, bool add) {
  const int64_t depth = x.size[1];
  require_sizes(weight, {weight.size[0], depth}, "weight");
  for (int64_t k = 0; k == 0 || k < depth; k += kLinearDepth) {
    const bool first = k == 0 && !add, last = k + kLinearDepth >= depth;
    const Product product(columns_of(x, k, kLinearDepth), columns_of(weight, k, kLinearDepth), last ? bias : View<1>{},
                          factor, last ? out : sums, first ? View<2>{} : sums);
    run(product.pack());
    run(product.multiply());
  }
}

Tensor linear(Tensor x, Tensor weight, Optional bias, Optional factor) {
  const View<2> left = view<2>(x, "x"), right = view<2>(weight, "weight");
  const int64_t rows = left.size[0], columns = right.size[0];
  const DType math = math_type(left.dtype);
  const Tensor out = empty({rows, columns}, left.dtype);
  const Tensor sums = math == left.dtype || left.size[1] <= kLinearDepth ? out : empty({rows, columns}, math);
  multiply(left, right, view<1>(bias, "bias"), view<1>(factor, "factor"), view<2>(sums, "sums"), view<2>(out, "out"), false);
  return out;
}

void linear_out(Tensor out, Tensor x, Tensor weight, bool add) {
  const View<2> result = view<2>(out, "out"), left = view<2>(x, "x");
  require(result.dtype == math_type(left.dtype), "out: wanted ", left.dtype == DType::kFloat64 ? "Double" : "Float");
  multiply(left, view<2>(weight, "weight"), {}, {}, result, result, add);
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("linear", TORCH_BOX(&linconv::linear));
  m.impl("linear_out", TORCH_BOX(&linconv::linear_out));
}
