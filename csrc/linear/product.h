// A product with a weight, for operators that take one among other things. For cpu.cpp.
#pragma once

#include "common/tasks.h"
#include "common/tensor.h"
#include "linear/kernel.h"

namespace linconv {

// out = sums + x weight^T + factor bias^T, without bias or sums where they are absent, with ones where `factor` is. Both
// steps are to be run, pack() first. The smaller factor of the product is what is packed: sums have the same order either way.
struct Product {
  LinearArgs args{};
  Tensor packed;
  bool fp64;

  // Throws where sizes or dtypes do not go together.
  Product(const View<2>& x, const View<2>& weight, const View<1>& bias, const View<1>& factor, const View<2>& out,
          const View<2>& sums = {});

  Tasks pack() const;
  Tasks multiply() const;
};

}  // namespace linconv
