// The right factor of a product, laid out so that it is read front to back: panels as wide as a tile of the result.
#pragma once

#include <cstdint>

#include "common/gemm.h"
#include "common/transpose.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
constexpr int kPanel = kTileVectors * kWidth<T>;

// Rows of a panel whose depth is `depth`, with those that transpose_to_panels may write behind.
template <class T>
int64_t panel_height(int64_t depth) {
  return (depth + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}
template <class T>
int64_t panels_size(int64_t columns, int64_t depth) {
  return (columns + kPanel<T> - 1) / kPanel<T> * kPanel<T> * panel_height<T>(depth);
}

// A matrix (rows, columns) in scratch, transposed into panels: element (i, j) at panels[i / kPanel][j][i % kPanel], the
// right factor of products whose columns are its rows. Rows behind the last one, up to a whole panel, become zeros.
template <class T>
void transpose_to_panels(T* from, int ld, int rows, int columns, T* panels) {
  const int padded = round_up(rows, kPanel<T>), height = static_cast<int>(panel_height<T>(columns));
  for (int i = rows; i < padded; ++i)
    for (int j = 0; j < height; ++j) from[i * ld + j] = 0;
  for (int i = 0; i < padded; i += kPanel<T>)
    transpose(from + i * ld, ld, kPanel<T>, height, panels + int64_t(i) * height, kPanel<T>);
}

// c (rows, panels of columns) = a (rows, depth) times panels of transpose_to_panels, whose matrix has `depth` columns.
template <class T, Update update>
void gemm_panels(int rows, int columns, int depth, Strided<T> a, const T* panels, T* c, int ldc) {
  const int64_t height = panel_height<T>(depth);
  for (int j = 0; j < columns; j += kPanel<T>)
    gemm<T, update, Triangle::kNone>(rows, kPanel<T>, depth, a, panels + j * height, kPanel<T>, c + j, ldc);
}

}  // namespace
}  // namespace linconv::LINCONV_ISA
