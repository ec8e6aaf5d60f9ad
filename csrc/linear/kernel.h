// A product with a weight, x weight^T + bias. A row's bits depend on the row alone, not on how many there are.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int64_t kLinearRows = 64, kLinearColumns = 256;  // of one task's result
constexpr int64_t kLinearPacked = 64;                      // columns that one task packs: whole panels of every instruction set

struct LinearArgs {
  View<2> x;       // (rows, depth)
  View<2> weight;  // (columns, depth)
  View<1> bias;    // (columns,), or absent
  View<1> factor;  // (rows,): what bias is multiplied by in each row; absent for 1
  View<2> out;     // (rows, columns)
  void* packed;    // linear_packed elements of the math type: weight as the product reads it
  int64_t rows, columns, depth;

  int64_t column_blocks() const { return (columns + kLinearColumns - 1) / kLinearColumns; }
};

static inline int64_t linear_packed(int64_t columns, int64_t depth) {
  return (columns + kLinearPacked - 1) / kLinearPacked * kLinearPacked * ((depth + 15) / 16 * 16);
}

// Tasks: every kLinearPacked columns.
LINCONV_KERNEL(void, linear_pack, const LinearArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: blocks of rows, blocks of columns.
LINCONV_KERNEL(void, linear, const LinearArgs& args, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
