// A product with a weight. A row's bits depend on the row alone, not on how many there are: every sum is taken in one
// order, whichever way the work is cut.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int64_t kLinearRows = 64, kLinearColumns = 128;  // of one task's result
constexpr int64_t kLinearDepth = 1024;                     // of a product that is packed at a time
constexpr int64_t kLinearPacked = 64;                      // columns that one task packs: whole panels of every instruction set

// out = sums + left right^T + of_rows of_columns^T
struct LinearArgs {
  View<2> left;        // (rows, depth)
  View<2> right;       // (columns, depth)
  View<1> of_rows;     // (rows,), or absent for ones
  View<1> of_columns;  // (columns,), or absent for ones; nothing is added where both are absent
  View<2> sums;        // (rows, columns), or absent for zeros; may be out
  View<2> out;         // (rows, columns)
  void* packed;        // linear_packed elements of the math type, or fewer of pairs: right as the product reads it
  int64_t rows, columns, depth;

  int64_t row_blocks() const { return (rows + kLinearRows - 1) / kLinearRows; }
  int64_t column_blocks() const { return (columns + kLinearColumns - 1) / kLinearColumns; }
};

static inline int64_t linear_packed(int64_t columns, int64_t depth) {
  return (columns + kLinearPacked - 1) / kLinearPacked * kLinearPacked * ((depth + 15) / 16 * 16);
}

// Tasks: every kLinearPacked columns.
LINCONV_KERNEL(void, linear_pack, const LinearArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: blocks of columns, blocks of rows.
LINCONV_KERNEL(void, linear, const LinearArgs& args, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
