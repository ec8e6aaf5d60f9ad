// Small dense products over scratch that fits a core's caches, register-blocked in vector extensions.
//
// C (rows x cols) = or += A (rows x depth) B (depth x cols). A is read one element at a time and broadcast, so either
// of its strides may be anything (a transposed A costs nothing); B and C are read in vectors along cols. Callers pad:
// rows to a multiple of kTileRows, cols to a multiple of the vector width, both inside the buffers they own.
//
// Elements of A and B are factors: of type T as C's, or, where kPairProducts, BFloat16Pair, two neighbours along depth at a
// time. Depth and strides count factors.
#pragma once

#include <cstdint>

#include "common/vec.h"

namespace linconv::LINCONV_ISA {
namespace {

// Accumulators fill about half the register file; the rest holds one row of B and the broadcast element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;

// Which part of depth reaches a tile, or which tiles are wanted, when a factor or the result is lower triangular.
enum class Triangle {
  kNone,
  kLeft,        // A is lower triangular: depth < row + kTileRows
  kTransposed,  // A is the transpose of a lower triangular matrix: depth >= row
  kRight,       // B is lower triangular: depth >= first column of the tile
  kResult,      // only tiles of C that touch or lie below the diagonal are computed
};

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of memory that will be wanted soon, asked for a few at a time between the tiles of a product: rows too far apart
// for the hardware to foresee, and too many to ask for at once.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* data, int64_t row_stride, int rows, int64_t row_bytes)
      : next_(static_cast<const char*>(data)), row_stride_(row_stride), rows_(rows), row_bytes_(row_bytes) {}

  // Spreads all rows over that many calls of step().
  void over(int steps) { rows_per_step_ = (rows_ + steps - 1) / steps; }
  void step() {
    for (int i = 0; i < rows_per_step_ && rows_ > 0; ++i, --rows_, next_ += row_stride_)
      for (int64_t at = 0; at < row_bytes_; at += 64) __builtin_prefetch(next_ + at, 0, 2);
  }

 private:
  const char* next_ = nullptr;
  int64_t row_stride_ = 0;
  int rows_ = 0, rows_per_step_ = 0;
  int64_t row_bytes_ = 0;
};

template <class F>
struct Strided {  // A: element (row, k) at data[row * row_stride + k * depth_stride]
  const F* data;
  int64_t row_stride, depth_stride;
};

// What becomes of a finished tile row: C = product, C += product, C = decay * old + product, C = rows[row] * product.
enum class Update { kStore, kAdd, kDecay, kScaleRows };

template <class T>
struct Scaling {
  const T* old = nullptr;  // kDecay: laid out as C, which it may be
  T decay = 0;
  const T* rows = nullptr;  // kScaleRows
};

template <class T, Update update, int vectors, class F>
LINCONV_INLINE void gemm_tile(
    int depth_begin, int depth_end, const F* a, int64_t a_row, int64_t a_depth, const F* b, int64_t ldb, T* c,
    int64_t ldc, Scaling<T> scaling) {
  using V = Vec<T>;
  V acc[kTileRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) acc[i][v] = splat<T>(0);
  a += depth_begin * a_depth;
  b += depth_begin * ldb;
  for (int k = depth_begin; k < depth_end; ++k) {
    Vec<F> row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load(b + v * kWidth<F>);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<F> element = splat(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[i][v] = add_product(acc[i][v], element, row[v]);
    }
    a += a_depth;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      T* to = c + i * ldc + v * kWidth<T>;
      const V product = acc[i][v];
      if constexpr (update == Update::kStore) store(to, product);
      if constexpr (update == Update::kAdd) store(to, load(to) + product);
      if constexpr (update == Update::kDecay) store(to, add_product(product, splat(scaling.decay), load(scaling.old + i * ldc + v * kWidth<T>)));
      if constexpr (update == Update::kScaleRows) store(to, splat(scaling.rows[i]) * product);
    }
}

template <class T, Update update, Triangle triangle, class F>
inline void gemm(int rows, int cols, int depth, Strided<F> a, const F* b, int64_t ldb, T* c, int64_t ldc,
                 Ahead ahead = {}, Scaling<T> scaling = {}) {
  static_assert(kWidth<F> == kWidth<T>);
  constexpr int panel = kTileVectors * kWidth<T>;
  ahead.over((cols + panel - 1) / panel * (rows / kTileRows));
  // A panel of B stays in L1 while the rows of A go by.
  for (int col = 0; col < cols; col += panel) {
    for (int row = 0; row < rows; row += kTileRows) {
      int begin = 0, end = depth;
      if (triangle == Triangle::kLeft) end = row + kTileRows < depth ? row + kTileRows : depth;
      if (triangle == Triangle::kTransposed) begin = row;
      if (triangle == Triangle::kRight) begin = col;
      ahead.step();
      if (triangle == Triangle::kResult && col >= row + kTileRows) continue;
      const F* a_tile = a.data + row * a.row_stride;
      T* c_tile = c + row * ldc + col;
      Scaling<T> of_tile = scaling;
      if (update == Update::kDecay) of_tile.old += row * ldc + col;
      if (update == Update::kScaleRows) of_tile.rows += row;
      if (col + panel <= cols)
        gemm_tile<T, update, kTileVectors>(begin, end, a_tile, a.row_stride, a.depth_stride, b + col, ldb, c_tile, ldc,
                                           of_tile);
      else
        gemm_tile<T, update, 1>(begin, end, a_tile, a.row_stride, a.depth_stride, b + col, ldb, c_tile, ldc, of_tile);
    }
  }
}

}  // namespace
}  // namespace linconv::LINCONV_ISA
