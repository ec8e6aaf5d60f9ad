#include "linear/kernel.h"

#include "common/arena.h"
#include "common/panels.h"
#include "common/rows.h"

namespace linconv::LINCONV_ISA {
namespace {

constexpr int kDepth = 256;  // of the sums that a pass over a tile makes: a panel of the weight's stays in L1

int64_t magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

template <class T>
void pack(const LinearArgs& args, int64_t begin, int64_t end) {
  const View<2>& weight = args.weight;
  const int64_t height = panel_height<T>(args.depth);
  // Columns of the result whose elements are closer to each other along the depth are read so, and transposed.
  const bool by_column = magnitude(weight.stride[1]) <= magnitude(weight.stride[0]);
  const bool in_place = weight.dtype == kMathDType<T> && weight.stride[1] == 1;
  constexpr int ld = kDepth + kWidth<T>;
  Arena arena(by_column ? Arena::bytes<T>(kPanel<T> * ld) : 0);
  T* rows = by_column ? arena.take<T>(kPanel<T> * ld) : nullptr;
  for (int64_t column = begin * kLinearPacked; column < min(end * kLinearPacked, args.columns); column += kPanel<T>) {
    const int count = static_cast<int>(min<int64_t>(kPanel<T>, args.columns - column));
    T* panel = static_cast<T*>(args.packed) + column * height;
    if (by_column) {
      for (int64_t k = 0; k < args.depth; k += kDepth) {
        const int depth = static_cast<int>(min<int64_t>(kDepth, args.depth - k));
        T* to = panel + k * kPanel<T>;
        if (in_place && count == kPanel<T> && depth % kWidth<T> == 0) {
          transpose(static_cast<const T*>(at(weight, column, k)), weight.stride[0], count, depth, to, kPanel<T>);
          continue;
        }
        for (int i = 0; i < count; ++i) load_row(at(weight, column + i, k), weight.dtype, weight.stride[1], depth, rows + i * ld);
        transpose_to_panels(rows, ld, count, depth, to);
      }
    } else {
      for (int64_t k = 0; k < args.depth; ++k, panel += kPanel<T>) {
        load_row(at(weight, column, k), weight.dtype, weight.stride[0], count, panel);
        for (int i = count; i < kPanel<T>; ++i) panel[i] = 0;
      }
    }
  }
}

// Rows of x as the product reads them: where they are if they can be, else in scratch, read from memory once for all
// columns where the whole depth fits.
template <class T>
class LeftRows {
 public:
  explicit LeftRows(const LinearArgs& args)
      : args_(args), x_(args.x), by_row_(magnitude(x_.stride[1]) <= magnitude(x_.stride[0])), in_place_(readable()),
        depth_(static_cast<int>(args.depth <= kDepthKept ? args.depth : kDepth)),
        ld_(round_up(by_row_ ? depth_ : static_cast<int>(kLinearRows), kWidth<T>) + kWidth<T>),
        arena_(Arena::bytes<T>((by_row_ ? kLinearRows : depth_) * ld_)),
        rows_(arena_.template take<T>((by_row_ ? kLinearRows : depth_) * ld_)) {}

  // `rows` from `row` on, `depth` of their elements from k on.
  Strided<T> load(int64_t row, int rows, int64_t k, int depth) {
    if (in_place_ && rows % kTileRows == 0) return {static_cast<const T*>(at(x_, row, k)), x_.stride[0], 1};
    if (args_.depth > kDepthKept)
      copy(row, rows, k, depth), k = 0;
    else if (row != row_)
      copy(row, rows, 0, depth_), row_ = row;
    // Elements are read one by one: they may lie side by side along the rows or along the depth, as they do in memory.
    return by_row_ ? Strided<T>{rows_ + k, ld_, 1} : Strided<T>{rows_ + k * ld_, 1, ld_};
  }

 private:
  static constexpr int kDepthKept = 1024;

  // Rows a large power of two apart would fall into the same cache sets.
  bool readable() const {
    const int64_t bytes = x_.stride[0] * int64_t(sizeof(T));
    return x_.dtype == kMathDType<T> && x_.stride[1] == 1 && bytes % 2048 != 0;
  }

  void copy(int64_t row, int rows, int64_t k, int depth) {
    if (by_row_)
      for (int i = 0; i < rows; ++i) load_row(at(x_, row + i, k), x_.dtype, x_.stride[1], depth, rows_ + i * ld_);
    else
      for (int i = 0; i < depth; ++i) load_row(at(x_, row, k + i), x_.dtype, x_.stride[0], rows, rows_ + i * ld_);
  }

  const LinearArgs& args_;
  const View<2>& x_;
  const bool by_row_, in_place_;
  const int depth_, ld_;
  Arena arena_;
  T* rows_;
  int64_t row_ = -1;  // of the rows that are there
};

template <class T>
void multiply(const LinearArgs& args, int64_t begin, int64_t end) {
  constexpr int ld = kLinearColumns + kWidth<T>;
  const int64_t height = panel_height<T>(args.depth);
  LeftRows<T> left(args);
  Arena arena(Arena::bytes<T>(kLinearRows * ld) + Arena::bytes<T>(kLinearColumns));
  T *sums = arena.take<T>(kLinearRows * ld), *bias = arena.take<T>(kLinearColumns);
  for (; begin < end; ++begin) {
    const int64_t row = begin / args.column_blocks() * kLinearRows, column = begin % args.column_blocks() * kLinearColumns;
    const int rows = static_cast<int>(min(kLinearRows, args.rows - row)), tiled = round_up(rows, kTileRows);
    const int columns = static_cast<int>(min(kLinearColumns, args.columns - column));
    for (int64_t k = 0; k == 0 || k < args.depth; k += kDepth) {
      const int depth = static_cast<int>(min<int64_t>(kDepth, args.depth - k));
      const Strided<T> a = left.load(row, rows, k, depth);
      const T* panels = static_cast<const T*>(args.packed) + column * height + k * kPanel<T>;
      // A tile's rows stay in L1 while the panels stream by, front to back.
      for (int i = 0; i < tiled; i += kTileRows)
        for (int j = 0; j < columns; j += kPanel<T>) {
          const Strided<T> tile{a.data + i * a.row_stride, a.row_stride, a.depth_stride};
          const T* panel = panels + j * height;
          T* sum = sums + i * ld + j;
          if (k == 0)
            gemm<T, Update::kStore, Triangle::kNone>(kTileRows, kPanel<T>, depth, tile, panel, kPanel<T>, sum, ld);
          else
            gemm<T, Update::kAdd, Triangle::kNone>(kTileRows, kPanel<T>, depth, tile, panel, kPanel<T>, sum, ld);
        }
    }
    if (args.bias.data) load_row(at(args.bias, column), args.bias.dtype, args.bias.stride[0], columns, bias);
    for (int i = 0; i < rows; ++i) {
      T* sum = sums + i * ld;
      if (args.bias.data) {
        T factor = 1;
        if (args.factor.data) load_row(at(args.factor, row + i), args.factor.dtype, 1, 1, &factor);
        for (int j = 0; j < columns; ++j) sum[j] += factor * bias[j];
      }
      store_row(at(args.out, row + i, column), args.out.dtype, args.out.stride[1], columns, sum);
    }
  }
}

}  // namespace

void linear_pack(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? pack<double>(args, begin, end) : pack<float>(args, begin, end);
}
void linear(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? multiply<double>(args, begin, end) : multiply<float>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
