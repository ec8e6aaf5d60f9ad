// Sums of partial results in a fixed order.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace linconv {

// out[i] = the sum over a < outer, b < inner of parts[a * outer_stride + b * inner_stride + i], a outermost; out is
// contiguous, parts are of the math type.
struct PartsArgs {
  const void* parts;
  int64_t outer, outer_stride, inner, inner_stride;
  void* out;
  DType dtype;
};

// Tasks are elements.
LINCONV_KERNEL(void, sum_parts, const PartsArgs& args, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
