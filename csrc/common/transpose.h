// Transposition of small matrices, a vector-width square at a time.
#pragma once

#include <cstdint>

#include "common/vec.h"

// The lanes of these numbers, b's behind a's.
#if defined(__clang__)
#define LINCONV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has the other only from 12 on
#define LINCONV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, BitVec<T>{__VA_ARGS__})
#endif

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
inline Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  if constexpr (kWidth<T> == 16)
    return LINCONV_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else if constexpr (kWidth<T> == 8)
    return LINCONV_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else if constexpr (kWidth<T> == 4)
    return LINCONV_SHUFFLE(a, b, 0, 4, 1, 5);
  else
    return LINCONV_SHUFFLE(a, b, 0, 2);
}

template <class T>
inline Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  if constexpr (kWidth<T> == 16)
    return LINCONV_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  else if constexpr (kWidth<T> == 8)
    return LINCONV_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else if constexpr (kWidth<T> == 4)
    return LINCONV_SHUFFLE(a, b, 2, 6, 3, 7);
  else
    return LINCONV_SHUFFLE(a, b, 1, 3);
}

// to[j * ldt + i] = from[i * ldf + j]; rows and columns are multiples of the vector width.
template <class T>
inline void transpose(const T* from, int64_t ldf, int rows, int columns, T* to, int64_t ldt) {
  constexpr int W = kWidth<T>;
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < columns; j += W) {
      Vec<T> now[W], next[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) now[r] = load(from + (i + r) * ldf + j);
      // Each perfect shuffle of rows r and r + W/2 rotates the bits of (row, column) by one; log2(W) of them swap the two.
#pragma GCC unroll 4
      for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < W / 2; ++r) {
          next[2 * r] = interleave_low<T>(now[r], now[r + W / 2]);
          next[2 * r + 1] = interleave_high<T>(now[r], now[r + W / 2]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) now[r] = next[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (j + r) * ldt + i, now[r]);
    }
}

}  // namespace
}  // namespace linconv::LINCONV_ISA

#undef LINCONV_SHUFFLE
