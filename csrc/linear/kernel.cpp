#include "linear/kernel.h"

#include "common/arena.h"
#include "common/factors.h"
#include "common/panels.h"

namespace linconv::LINCONV_ISA {
namespace {

constexpr int kDepth = 256;  // factors that a tile sums in registers

// A product with few columns has a layout of its own: vectors go along the rows, of which so many are summed at a time.
constexpr int kFewColumns = 4, kFewVectors = 4, kFewSums = kVectorBytes == 32 ? 8 : 16;  // the last is what registers hold
template <class F>
constexpr int kFewRows = kFewVectors * kWidth<F>;

int64_t magnitude(int64_t stride) { return stride < 0 ? -stride : stride; }

// Whether a row's elements lie closer to each other than a column's.
bool by_row(const View<2>& view) { return magnitude(view.stride[1]) <= magnitude(view.stride[0]); }

template <class F>
void pack(const LinearArgs& args, int64_t begin, int64_t end) {
  const View<2>& right = args.right;
  const int64_t all = factors<F>(args.depth), height = panel_height<F>(all);
  const bool transposed = by_row(right), in_place = reads_in_place<F>(right);
  constexpr int ld = kDepth + kWidth<F>;
  Arena arena(Arena::bytes<F>(kPanel<F> * ld));
  F* rows = arena.take<F>(kPanel<F> * ld);
  for (int64_t column = begin * kLinearPacked; column < min(end * kLinearPacked, args.columns); column += kPanel<F>) {
    const int count = static_cast<int>(min<int64_t>(kPanel<F>, args.columns - column));
    F* panel = static_cast<F*>(args.packed) + column * height;
    for (int64_t k = 0; transposed && k < all; k += kDepth) {
      const int depth = static_cast<int>(min<int64_t>(kDepth, all - k));
      const int64_t number = k * kNumbers<F>, numbers = min<int64_t>(kDepth * kNumbers<F>, args.depth - number);
      F* to = panel + k * kPanel<F>;
      if (in_place && count == kPanel<F> && depth % kWidth<F> == 0) {
        transpose(static_cast<const F*>(at(right, column, number)), right.stride[0] / kNumbers<F>, count, depth, to, kPanel<F>);
        continue;
      }
      for (int i = 0; i < count; ++i)
        load_along(at(right, column + i, number), right.dtype, right.stride[1], numbers, rows + i * ld);
      transpose_to_panels(rows, ld, count, depth, to);
    }
    for (int64_t k = 0; !transposed && k < args.depth; k += kNumbers<F>, panel += kPanel<F>) {
      load_across(at(right, column, k), right.dtype, right.stride[0], right.stride[1], args.depth - k, count, panel);
      for (int i = count; i < kPanel<F>; ++i) panel[i] = F{};
    }
  }
}

// Rows of the left factor as the product reads them: where they are if they can be, else in scratch.
template <class F>
class LeftRows {
 public:
  // They are read in tiles of so many rows and by single factors of the depth, or by so many.
  LeftRows(const View<2>& view, int tile_rows, int tile_depth)
      : view_(view), tile_rows_(tile_rows), by_row_(by_row(view)),
        in_place_(reads_in_place<F>(view) && factors<F>(view.size[1]) % tile_depth == 0),
        ld_((by_row_ ? kDepth : static_cast<int>(kLinearRows)) + kWidth<F>),
        arena_(Arena::bytes<F>((by_row_ ? kLinearRows : kDepth) * ld_)),
        rows_(arena_.template take<F>((by_row_ ? kLinearRows : kDepth) * ld_)) {}

  // What load() would copy of `rows` from `row` on, from the factor k on.
  Ahead ahead(int64_t row, int64_t rows, int64_t k) const {
    if (in_place_) return {};
    const int64_t number = k * kNumbers<F>, numbers = min<int64_t>(kDepth * kNumbers<F>, view_.size[1] - number);
    const int64_t bytes = element_size(view_.dtype), left = min(rows, view_.size[0] - row);
    const void* data = at(view_, row, number);
    if (by_row_) return {data, view_.stride[0] * bytes, static_cast<int>(left), numbers * bytes};
    return {data, view_.stride[1] * bytes, static_cast<int>(numbers), left * bytes};
  }

  // `rows` from `row` on, `depth` of their factors from k on.
  Strided<F> load(int64_t row, int rows, int64_t k, int depth) {
    const int64_t number = k * kNumbers<F>, numbers = min<int64_t>(depth * kNumbers<F>, view_.size[1] - number);
    if (in_place_ && rows % tile_rows_ == 0)
      return {static_cast<const F*>(at(view_, row, number)), view_.stride[0] / kNumbers<F>, 1};
    // Factors are read one by one: they may lie side by side along the rows or along the depth, as they do in memory.
    if (by_row_) {
      for (int i = 0; i < rows; ++i)
        load_along(at(view_, row + i, number), view_.dtype, view_.stride[1], numbers, rows_ + i * ld_);
      return {rows_, ld_, 1};
    }
    for (int i = 0; i < depth; ++i) {
      const int64_t n = i * kNumbers<F>;
      load_across(at(view_, row, number + n), view_.dtype, view_.stride[0], view_.stride[1], numbers - n, rows, rows_ + i * ld_);
    }
    return {rows_, 1, ld_};
  }

 private:
  const View<2>& view_;
  const int tile_rows_;
  const bool by_row_, in_place_;
  const int ld_;
  Arena arena_;
  F* rows_;
};

template <class T>
void load_or_ones(const View<1>& view, int64_t first, int n, T* to) {
  if (view.data != nullptr) return load_row(at(view, first), view.dtype, view.stride[0], n, to);
  for (int i = 0; i < n; ++i) to[i] = 1;
}

// sums (rows, columns) = or += left (rows, depth) times a panel (depth, columns), 1 to kFewColumns of them: the sums of
// gemm(), taken in its order. Rows in memory are transposed, a square of kFewRows at a time, into scratch of its size.
template <int columns, class T, class F>
void multiply_few(bool add, int rows, int depth, Strided<F> left, const F* panel, F* scratch, T* sums, int64_t ld, Ahead ahead) {
  constexpr int R = kFewRows<F>, W = kWidth<F>;
  constexpr int V = columns * kFewVectors <= kFewSums ? kFewVectors : kFewVectors / 2, passes = kFewVectors / V;
  // Factors of the depth that lie between what is read and what is asked for, and between two times of asking.
  constexpr int kAhead = 64, kStep = 4;
  ahead.over((rows + R - 1) / R * passes * max((depth + kStep - 1) / kStep, 1));
  for (int i = 0; i < rows; i += R) {
    Vec<T> all[columns][kFewVectors] = {};
    for (int k = 0; k < depth; k += R) {
      const int n = min(depth - k, R);
      const F* block = left.data + i * left.row_stride + k * left.depth_stride;
      int64_t block_ld = left.depth_stride;
      Ahead next;
      if (left.depth_stride == 1) {
        transpose(block, left.row_stride, R, round_up(n, W), scratch, R);
        next = {block + kAhead, left.row_stride * int64_t(sizeof(F)), R, R * int64_t(sizeof(F))};
        next.over((n + kStep - 1) / kStep * passes);
        block = scratch, block_ld = R;
      }
      for (int first = 0; first < kFewVectors; first += V) {
        Vec<T> acc[columns][V];
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) acc[j][v] = all[j][first + v];
        for (int t = 0; t < n; ++t) {
          if (t % kStep == 0) ahead.step(), next.step();
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            const Vec<F> of_rows = load(block + t * block_ld + (first + v) * W);
#pragma GCC unroll 4
            for (int j = 0; j < columns; ++j)
              acc[j][v] = add_product(acc[j][v], of_rows, splat(panel[(k + t) * kPanel<F> + j]));
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) all[j][first + v] = acc[j][v];
      }
    }
    for (int r = 0; r < min(R, rows - i); ++r)
      for (int j = 0; j < columns; ++j) {
        T& sum = sums[(i + r) * ld + j];
        sum = (add ? sum : T(0)) + all[j][r / W][r % W];
      }
  }
}

template <class T, class F>
class Multiply {
 public:
  explicit Multiply(const LinearArgs& args)
      : args_(args), few_(args.columns <= kFewColumns), left_(args.left, few_ ? kFewRows<F> : kTileRows, few_ ? kWidth<F> : 1),
        arena_(Arena::bytes<T>(kLinearRows * kLd) + Arena::bytes<T>(kLinearColumns * kLdTransposed) +
               Arena::bytes<T>(kLinearRows) + Arena::bytes<T>(kLinearColumns) + Arena::bytes<F>(kFewRows<F> * kFewRows<F>)) {
    sums_ = arena_.template take<T>(kLinearRows * kLd);
    transposed_ = arena_.template take<T>(kLinearColumns * kLdTransposed);
    of_rows_ = arena_.template take<T>(kLinearRows);
    of_columns_ = arena_.template take<T>(kLinearColumns);
    square_ = arena_.template take<F>(kFewRows<F> * kFewRows<F>);
  }

  void run(int64_t index) {
    const int64_t column = index / args_.row_blocks() * kLinearColumns, row = index % args_.row_blocks() * kLinearRows;
    const int rows = static_cast<int>(min(kLinearRows, args_.rows - row));
    const int columns = static_cast<int>(min(kLinearColumns, args_.columns - column));
    if (args_.sums.data != nullptr) load(args_.sums, row, rows, column, columns);
    multiply(row, rows, column, columns);
    if (args_.of_rows.data != nullptr || args_.of_columns.data != nullptr) {
      load_or_ones(args_.of_rows, row, rows, of_rows_);
      load_or_ones(args_.of_columns, column, columns, of_columns_);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) sums_[i * kLd + j] += of_rows_[i] * of_columns_[j];
    }
    store(args_.out, row, rows, column, columns);
  }

 private:
  static constexpr int kLd = kLinearColumns + kWidth<T>, kLdTransposed = kLinearRows + kWidth<T>;

  void load(const View<2>& from, int64_t row, int rows, int64_t column, int columns) {
    const void* start = at(from, row, column);
    if (by_row(from)) return load_rows(start, from.dtype, from.stride[0], from.stride[1], rows, columns, sums_, kLd);
    load_rows(start, from.dtype, from.stride[1], from.stride[0], columns, rows, transposed_, kLdTransposed);
    transpose(transposed_, kLdTransposed, round_up(columns, kWidth<T>), round_up(rows, kWidth<T>), sums_, kLd);
  }

  void store(const View<2>& to, int64_t row, int rows, int64_t column, int columns) {
    void* start = at(to, row, column);
    if (by_row(to)) return store_rows(start, to.dtype, to.stride[0], to.stride[1], rows, columns, sums_, kLd);
    transpose(sums_, kLd, round_up(rows, kWidth<T>), round_up(columns, kWidth<T>), transposed_, kLdTransposed);
    store_rows(start, to.dtype, to.stride[1], to.stride[0], columns, rows, transposed_, kLdTransposed);
  }

  void multiply(int64_t row, int rows, int64_t column, int columns) {
    const int64_t all = factors<F>(args_.depth), height = panel_height<F>(all);
    for (int64_t k = 0; k == 0 || k < all; k += kDepth) {
      const int depth = static_cast<int>(min<int64_t>(kDepth, all - k));
      const Strided<F> left = left_.load(row, rows, k, depth);
      const F* panels = static_cast<const F*>(args_.packed) + column * height + k * kPanel<F>;
      const bool add = k > 0 || args_.sums.data != nullptr;
      if (few_) {
        // Memory binds: what is read next is asked for meanwhile.
        const bool more = k + depth < all;
        multiply_few(add, rows, depth, left, panels, columns, left_.ahead(more ? row : row + rows, kLinearRows, more ? k + depth : 0));
        continue;
      }
      // A tile's rows stay in L1 while the panels stream by, front to back.
      for (int i = 0; i < rows; i += kTileRows)
        for (int j = 0; j < columns; j += kPanel<F>) {
          const Strided<F> tile{left.data + i * left.row_stride, left.row_stride, left.depth_stride};
          const F* panel = panels + j * height;
          const int width = round_up(min(columns - j, kPanel<F>), kWidth<F>);
          T* sum = sums_ + i * kLd + j;
          if (add)
            gemm<T, Update::kAdd, Triangle::kNone>(kTileRows, width, depth, tile, panel, kPanel<F>, sum, kLd);
          else
            gemm<T, Update::kStore, Triangle::kNone>(kTileRows, width, depth, tile, panel, kPanel<F>, sum, kLd);
        }
    }
  }

  void multiply_few(bool add, int rows, int depth, Strided<F> left, const F* panel, int columns, Ahead ahead) {
    const auto by = [&]<int n>() { LINCONV_ISA::multiply_few<n>(add, rows, depth, left, panel, square_, sums_, kLd, ahead); };
    switch (columns) {
      case 1: return by.template operator()<1>();
      case 2: return by.template operator()<2>();
      case 3: return by.template operator()<3>();
      case 4: return by.template operator()<4>();
    }
  }

  const LinearArgs& args_;
  const bool few_;
  LeftRows<F> left_;
  Arena arena_;
  T *sums_, *transposed_;  // (rows, columns), (columns, rows)
  T *of_rows_, *of_columns_;
  F* square_;
};

template <class T, class F = T>
void multiply(const LinearArgs& args, int64_t begin, int64_t end) {
  Multiply<T, F> pass(args);
  for (; begin < end; ++begin) pass.run(begin);
}

// Whether products are taken of pairs of bfloat16 numbers, summed in float.
bool of_pairs(const LinearArgs& args) {
  return kPairProducts && args.left.dtype == DType::kBFloat16 && args.right.dtype == DType::kBFloat16;
}

}  // namespace

void linear_pack(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  if (of_pairs(args)) return pack<BFloat16Pair>(args, begin, end);
  fp64 ? pack<double>(args, begin, end) : pack<float>(args, begin, end);
}
void linear(const LinearArgs& args, bool fp64, int64_t begin, int64_t end) {
  if constexpr (kPairProducts)
    if (of_pairs(args)) return multiply<float, BFloat16Pair>(args, begin, end);
  fp64 ? multiply<double>(args, begin, end) : multiply<float>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
