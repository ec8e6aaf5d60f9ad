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

// The even units of a and then those of b, or the odd ones, in each block of n units of so many lanes.
template <class T, int n, int unit, bool odd>
inline Vec<T> unzip(Vec<T> a, Vec<T> b) {
  constexpr auto at = [](int lane) constexpr {
    const int k = lane / unit % n, from_b = k >= n / 2;
    return lane / (n * unit) * (n * unit) + (k % (n / 2) * 2 + odd) * unit + lane % unit + from_b * kWidth<T>;
  };
  if constexpr (kWidth<T> == 16)
    return LINCONV_SHUFFLE(a, b, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12),
                           at(13), at(14), at(15));
  else if constexpr (kWidth<T> == 8)
    return LINCONV_SHUFFLE(a, b, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  else if constexpr (kWidth<T> == 4)
    return LINCONV_SHUFFLE(a, b, at(0), at(1), at(2), at(3));
  else
    return LINCONV_SHUFFLE(a, b, at(0), at(1));
}

// Of n vectors, `apart` from each other, each block's n x n units. Each round rotates the bits of (vector, unit) by one;
// log2(n) of them swap the two.
template <class T, int n, int unit>
inline void transpose_units(Vec<T>* v, int apart) {
  Vec<T> next[n];
#pragma GCC unroll 2
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      next[i] = unzip<T, n, unit, false>(v[2 * i * apart], v[(2 * i + 1) * apart]);
      next[i + n / 2] = unzip<T, n, unit, true>(v[2 * i * apart], v[(2 * i + 1) * apart]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) v[i * apart] = next[i];
  }
}

// to[j * ldt + i] = from[i * ldf + j]; rows and columns are multiples of the vector width.
template <class T>
inline void transpose(const T* from, int64_t ldf, int rows, int columns, T* to, int64_t ldt) {
  // Squares of 128-bit blocks, and then the lanes of each block: instruction sets move lanes at little cost within these.
  constexpr int W = kWidth<T>, S = 16 / static_cast<int>(sizeof(T)), blocks = W / S;
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < columns; j += W) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) v[r] = load(from + (i + r) * ldf + j);
      if constexpr (blocks > 1)
#pragma GCC unroll 4
        for (int r = 0; r < S; ++r) transpose_units<T, blocks, S>(v + r, S);
#pragma GCC unroll 4
      for (int b = 0; b < blocks; ++b) transpose_units<T, S, 1>(v + b * S, 1);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(to + (j + r) * ldt + i, v[r]);
    }
}

}  // namespace
}  // namespace linconv::LINCONV_ISA

#undef LINCONV_SHUFFLE
