// What products read, in scratch or where it is: numbers of the math type, or pairs of bfloat16 numbers that are neighbours
// along the depth of the product. An odd depth ends with a pair whose second is zero. Rows in scratch are whole vectors
// long, behind n numbers too.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class F>
constexpr int kNumbers = __is_same(F, BFloat16Pair) ? 2 : 1;
template <class F>
constexpr DType kFactorDType = __is_same(F, BFloat16Pair) ? DType::kBFloat16 : kMathDType<F>;

// How many factors a depth of n numbers is.
template <class F>
constexpr int64_t factors(int64_t n) {
  return (n + kNumbers<F> - 1) / kNumbers<F>;
}

LINCONV_INLINE BFloat16Pair pair_of(BFloat16 first, BFloat16 second) {
  return static_cast<BFloat16Pair>(first.bits | static_cast<uint32_t>(second.bits) << 16);
}

// Whether the rows of a matrix, whose numbers lie along the depth, can be read as factors where they are.
template <class F>
bool reads_in_place(const View<2>& view) {
  return view.dtype == kFactorDType<F> && view.stride[1] == 1 && view.size[1] % kNumbers<F> == 0 &&
         view.stride[0] % kNumbers<F> == 0 && reinterpret_cast<uintptr_t>(view.data) % sizeof(F) == 0;
}

// The factors of n numbers that lie along the depth.
template <class F>
void load_along(const void* p, DType dtype, int64_t stride, int64_t n, F* out) {
  if constexpr (__is_same(F, BFloat16Pair)) {
    const auto* from = static_cast<const BFloat16*>(p);
    const int64_t whole = n / 2;
    if (stride == 1)
      __builtin_memcpy(out, from, whole * sizeof(F));
    else
      for (int64_t i = 0; i < whole; ++i) out[i] = pair_of(from[2 * i * stride], from[(2 * i + 1) * stride]);
    if (n % 2 == 1) out[whole] = pair_of(from[(n - 1) * stride], {});
  } else {
    load_row(p, dtype, stride, n, out);
  }
}

// One factor of each of n rows or columns: of numbers that lie across the depth, and, where it is at least that deep, of
// those at the next place along it.
template <class F>
void load_across(const void* p, DType dtype, int64_t stride, int64_t depth_stride, int64_t depth, int64_t n, F* out) {
  if constexpr (__is_same(F, BFloat16Pair)) {
    const auto* first = static_cast<const BFloat16*>(p);
    const auto* second = first + depth_stride;
    if (depth < 2)
      for (int64_t i = 0; i < n; ++i) out[i] = pair_of(first[i * stride], {});
    else if (stride == 1)
      for (int64_t i = 0; i < n; ++i) out[i] = pair_of(first[i], second[i]);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = pair_of(first[i * stride], second[i * stride]);
  } else {
    load_row(p, dtype, stride, n, out);
  }
}

// `count` rows of n numbers from row `first` of a matrix on, to scratch: as factors along the rows, or across them, where
// kNumbers rows make up one of factors.
template <class F>
void load_rows_along(const void* start, DType dtype, int64_t row_stride, int64_t stride, int64_t first, int64_t count,
                     int64_t n, F* to, int ld) {
  for (int64_t i = 0; i < count; ++i) load_along(offset(start, dtype, (first + i) * row_stride), dtype, stride, n, to + i * ld);
}
template <class F>
void load_rows_across(const void* start, DType dtype, int64_t row_stride, int64_t stride, int64_t first, int64_t count,
                      int64_t n, F* to, int ld) {
  for (int64_t i = 0; i < count; i += kNumbers<F>, to += ld)
    load_across(offset(start, dtype, (first + i) * row_stride), dtype, stride, row_stride, count - i, n, to);
}

// Rows (count, n) in scratch as factors along the rows: where they are, or rounded, in `scratch` of the same width.
template <class F, class T>
const F* along(const T* rows, int count, int n, int ld, F* scratch) {
  if constexpr (__is_same(F, T)) return rows;
  else
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < n; j += kWidth<T>)
        store_as(reinterpret_cast<BFloat16*>(scratch + i * ld) + j, load(rows + i * ld + j));
  return scratch;
}

// The same across the rows.
template <class F, class T>
const F* across(const T* rows, int count, int n, int ld, F* scratch) {
  if constexpr (__is_same(F, T)) return rows;
  else
    for (int i = 0; i < count; i += 2)
      for (int j = 0; j < n; j += kWidth<T>) {
        const Vec<F> first = bfloat16_bits(load(rows + i * ld + j));
        const Vec<F> second = i + 1 < count ? bfloat16_bits(load(rows + (i + 1) * ld + j)) : Vec<F>{};
        store(scratch + i / 2 * ld + j, first | second << 16);
      }
  return scratch;
}

}  // namespace
}  // namespace linconv::LINCONV_ISA
