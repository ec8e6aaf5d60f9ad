#include "linear/kernel.h"

#include "common/arena.h"
#include "common/panels.h"
#include "common/rows.h"

namespace linconv::LINCONV_ISA {
namespace {

constexpr int kDepth = 256;  // that a tile sums in registers

int64_t magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

// Whether a row's elements lie closer to each other than a column's.
bool by_row(const View<2>& view) { return magnitude(view.stride[1]) <= magnitude(view.stride[0]); }

template <class T>
void pack(const LinearArgs& args, int64_t begin, int64_t end) {
  const View<2>& right = args.right;
  const int64_t height = panel_height<T>(args.depth);
  const bool transposed = by_row(right), in_place = right.dtype == kMathDType<T> && right.stride[1] == 1;
  constexpr int ld = kDepth + kWidth<T>;
  Arena arena(Arena::bytes<T>(kPanel<T> * ld));
  T* rows = arena.take<T>(kPanel<T> * ld);
  for (int64_t column = begin * kLinearPacked; column < min(end * kLinearPacked, args.columns); column += kPanel<T>) {
    const int count = static_cast<int>(min<int64_t>(kPanel<T>, args.columns - column));
    T* panel = static_cast<T*>(args.packed) + column * height;
    for (int64_t k = 0; transposed && k < args.depth; k += kDepth) {
      const int depth = static_cast<int>(min<int64_t>(kDepth, args.depth - k));
      T* to = panel + k * kPanel<T>;
      if (in_place && count == kPanel<T> && depth % kWidth<T> == 0) {
        transpose(static_cast<const T*>(at(right, column, k)), right.stride[0], count, depth, to, kPanel<T>);
        continue;
      }
      for (int i = 0; i < count; ++i) load_row(at(right, column + i, k), right.dtype, right.stride[1], depth, rows + i * ld);
      transpose_to_panels(rows, ld, count, depth, to);
    }
    for (int64_t k = 0; !transposed && k < args.depth; ++k, panel += kPanel<T>) {
      load_row(at(right, column, k), right.dtype, right.stride[0], count, panel);
      for (int i = count; i < kPanel<T>; ++i) panel[i] = 0;
    }
  }
}

// Rows of the left factor as the product reads them: where they are if they can be, else in scratch.
template <class T>
class LeftRows {
 public:
  explicit LeftRows(const View<2>& view)
      : view_(view), by_row_(by_row(view)), in_place_(view.dtype == kMathDType<T> && view.stride[1] == 1),
        ld_((by_row_ ? kDepth : static_cast<int>(kLinearRows)) + kWidth<T>),
        arena_(Arena::bytes<T>((by_row_ ? kLinearRows : kDepth) * ld_)),
        rows_(arena_.template take<T>((by_row_ ? kLinearRows : kDepth) * ld_)) {}

  // `rows` from `row` on, `depth` of their elements from k on.
  Strided<T> load(int64_t row, int rows, int64_t k, int depth) {
    if (in_place_ && rows % kTileRows == 0) return {static_cast<const T*>(at(view_, row, k)), view_.stride[0], 1};
    // Elements are read one by one: they may lie side by side along the rows or along the depth, as they do in memory.
    if (by_row_) {
      for (int i = 0; i < rows; ++i) load_row(at(view_, row + i, k), view_.dtype, view_.stride[1], depth, rows_ + i * ld_);
      return {rows_, ld_, 1};
    }
    for (int i = 0; i < depth; ++i) load_row(at(view_, row, k + i), view_.dtype, view_.stride[0], rows, rows_ + i * ld_);
    return {rows_, 1, ld_};
  }

 private:
  const View<2>& view_;
  const bool by_row_, in_place_;
  const int ld_;
  Arena arena_;
  T* rows_;
};

template <class T>
void load_or_ones(const View<1>& view, int64_t first, int n, T* to) {
  if (view.data != nullptr) return load_row(at(view, first), view.dtype, view.stride[0], n, to);
  for (int i = 0; i < n; ++i) to[i] = 1;
}

template <class T>
class Multiply {
 public:
  explicit Multiply(const LinearArgs& args)
      : args_(args), left_(args.left),
        arena_(Arena::bytes<T>(kLinearRows * kLd) + Arena::bytes<T>(kLinearColumns * kLdTransposed) +
               Arena::bytes<T>(kLinearRows) + Arena::bytes<T>(kLinearColumns)) {
    sums_ = arena_.template take<T>(kLinearRows * kLd);
    transposed_ = arena_.template take<T>(kLinearColumns * kLdTransposed);
    of_rows_ = arena_.template take<T>(kLinearRows);
    of_columns_ = arena_.template take<T>(kLinearColumns);
  }

  void run(int64_t index) {
    const int64_t column = index / args_.row_blocks() * kLinearColumns, row = index % args_.row_blocks() * kLinearRows;
    const int rows = static_cast<int>(min(kLinearRows, args_.rows - row));
    const int columns = static_cast<int>(min(kLinearColumns, args_.columns - column));
    multiply(row, rows, column, columns);
    if (args_.of_rows.data != nullptr || args_.of_columns.data != nullptr) {
      load_or_ones(args_.of_rows, row, rows, of_rows_);
      load_or_ones(args_.of_columns, column, columns, of_columns_);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) sums_[i * kLd + j] += of_rows_[i] * of_columns_[j];
    }
    const View<2>& out = args_.out;
    if (by_row(out)) {
      for (int i = 0; i < rows; ++i) store_row(at(out, row + i, column), out.dtype, out.stride[1], columns, sums_ + i * kLd);
      return;
    }
    transpose(sums_, kLd, round_up(rows, kWidth<T>), round_up(columns, kWidth<T>), transposed_, kLdTransposed);
    for (int j = 0; j < columns; ++j)
      store_row(at(out, row, column + j), out.dtype, out.stride[0], rows, transposed_ + j * kLdTransposed);
  }

 private:
  static constexpr int kLd = kLinearColumns + kWidth<T>, kLdTransposed = kLinearRows + kWidth<T>;

  void multiply(int64_t row, int rows, int64_t column, int columns) {
    const int64_t height = panel_height<T>(args_.depth);
    for (int64_t k = 0; k == 0 || k < args_.depth; k += kDepth) {
      const int depth = static_cast<int>(min<int64_t>(kDepth, args_.depth - k));
      const Strided<T> left = left_.load(row, rows, k, depth);
      const T* panels = static_cast<const T*>(args_.packed) + column * height + k * kPanel<T>;
      // A tile's rows stay in L1 while the panels stream by, front to back.
      for (int i = 0; i < rows; i += kTileRows)
        for (int j = 0; j < columns; j += kPanel<T>) {
          const Strided<T> tile{left.data + i * left.row_stride, left.row_stride, left.depth_stride};
          const T* panel = panels + j * height;
          const int width = round_up(min(columns - j, kPanel<T>), kWidth<T>);
          T* sum = sums_ + i * kLd + j;
          if (k == 0)
            gemm<T, Update::kStore, Triangle::kNone>(kTileRows, width, depth, tile, panel, kPanel<T>, sum, kLd);
          else
            gemm<T, Update::kAdd, Triangle::kNone>(kTileRows, width, depth, tile, panel, kPanel<T>, sum, kLd);
        }
    }
  }

  const LinearArgs& args_;
  LeftRows<T> left_;
  Arena arena_;
  T *sums_, *transposed_;  // (rows, columns), (columns, rows)
  T *of_rows_, *of_columns_;
};

template <class T>
void multiply(const LinearArgs& args, int64_t begin, int64_t end) {
  Multiply<T> pass(args);
  for (; begin < end; ++begin) pass.run(begin);
}

}  // namespace

void linear_pack(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? pack<double>(args, begin, end) : pack<float>(args, begin, end);
}
void linear(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? multiply<double>(args, begin, end) : multiply<float>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
