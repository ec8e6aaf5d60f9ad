// The right factor of a product, laid out so that it is read front to back: panels as wide as a tile of the result.
#pragma once

#include <cstdint>

#include "common/gemm.h"
#include "common/transpose.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class F>
constexpr int kPanel = kTileVectors * kWidth<F>;

// Rows of a panel whose depth is `depth` factors, with those that transpose_to_panels may write behind.
template <class F>
int64_t panel_height(int64_t depth) {
  return (depth + kWidth<F> - 1) / kWidth<F> * kWidth<F>;
}
template <class F>
int64_t panels_size(int64_t columns, int64_t depth) {
  return (columns + kPanel<F> - 1) / kPanel<F> * kPanel<F> * panel_height<F>(depth);
}

// A matrix (rows, columns) in scratch, transposed into panels: element (i, j) at panels[i / kPanel][j][i % kPanel], the
// right factor of products whose columns are its rows. Rows behind the last one, up to a whole panel, become zeros.
template <class F>
void transpose_to_panels(F* from, int ld, int rows, int columns, F* panels) {
  const int padded = round_up(rows, kPanel<F>), height = static_cast<int>(panel_height<F>(columns));
  for (int i = rows; i < padded; ++i)
    for (int j = 0; j < height; ++j) from[i * ld + j] = F{};
  for (int i = 0; i < padded; i += kPanel<F>)
    transpose(from + i * ld, ld, kPanel<F>, height, panels + int64_t(i) * height, kPanel<F>);
}

// c (rows, panels of columns) = a (rows, depth) times panels of transpose_to_panels, whose matrix has `depth` columns.
template <class T, Update update, class F>
void gemm_panels(int rows, int columns, int depth, Strided<F> a, const F* panels, T* c, int ldc) {
  const int64_t height = panel_height<F>(depth);
  for (int j = 0; j < columns; j += kPanel<F>)
    gemm<T, update, Triangle::kNone>(rows, kPanel<F>, depth, a, panels + j * height, kPanel<F>, c + j, ldc);
}

}  // namespace
}  // namespace linconv::LINCONV_ISA
