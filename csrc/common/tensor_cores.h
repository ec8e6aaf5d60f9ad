// Products on tensor cores: mma.sync m16n8k16 of bfloat16 or float16 with float32 sums, from sm_80 on.
//
// All is made of 16 x 16 matrices that a warp holds together. As the PTX ISA lays out mma.m16n8k16's A, lane 4 g + c has
// of a Fragment, whose values are 16 bits wide,
//
//   word 0: (g, 2c), (g, 2c + 1)          word 2: (g, 2c + 8), (g, 2c + 9)
//   word 1: (g + 8, 2c), (g + 8, 2c + 1)  word 3: (g + 8, 2c + 8), (g + 8, 2c + 9)
//
// the lower column in the lower half, and of an Accumulator the same elements in float32: those of word w are
// value[w / 2][w % 2 * 2] and the next. The one product is D += A B^T, whose B is laid out as A is but for the order of
// words: a RightFragment has words 0, 2, 1, 3, since the instruction wants 0 and 2 in neighbouring registers, and 1 and 3. So
// what is summed up can be multiplied again, on either side, where it is.
#pragma once

#include "common/cuda.h"

namespace linconv {

struct Fragment {
  uint32_t word[4];
};

struct RightFragment {
  uint32_t word[4];
};

struct Accumulator {
  float value[2][4];
};

// A lane's share of a fragment as memory holds it.
template <class F>
__device__ __forceinline__ uint4 words_of(const F& f) {
  return {f.word[0], f.word[1], f.word[2], f.word[3]};
}
template <class F>
__device__ __forceinline__ F fragment_of(const uint4& words) {
  return {{words.x, words.y, words.z, words.w}};
}
// A word of a right fragment as the same of a left one.
__device__ constexpr int left_word(int w) { return w % 2 * 2 + w / 2; }

#if defined(__CUDACC__)

namespace tensor_cores {

template <class S>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The lane's row begins `offset` values behind `start`. Volatile, with memory clobbered: no read moves past the barrier or
// the copies before it.
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const uint16_t* start, int offset, bool transposed) {
  const uint32_t row = shared_address(start) + static_cast<uint32_t>(offset) * 2;  // 32 bits of arithmetic, not 64
  if (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  }
}

}  // namespace tensor_cores

// Two values as one word, the first in its lower half.
template <class S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t out;
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
}

// 16 bytes of global memory into shared memory, of which the last 16 - `bytes` become zeros: there once waited for.
__device__ __forceinline__ void copy_later(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(tensor_cores::shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
// Of the copies that this thread asked for, until none is left on its way. Other threads see them behind a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

#else

namespace tensor_cores {

template <class S>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_on_host::mma(d, a, {b0, b1}, std::is_same_v<S, BFloat16>);
}

inline void ldmatrix(uint32_t (&out)[4], const uint16_t* start, int offset, bool transposed) {
  cuda_on_host::ldmatrix(out, start + offset, transposed);
}

}  // namespace tensor_cores

template <class S>
uint32_t pack(float low, float high) {
  return to_storage<S>(low).bits | static_cast<uint32_t>(to_storage<S>(high).bits) << 16;
}

using cuda_on_host::copy_later;
inline void wait_for_copies() {
  cuda_on_host::commit_copies();
  cuda_on_host::wait_copies(0);
}

#endif

// The value in the lower (0) or upper (1) half of a word.
template <class S>
__device__ __forceinline__ float unpack(uint32_t word, int half) {
  return to_math<float>(S{static_cast<uint16_t>(word >> 16 * half)});
}

// d += a b^T
template <class S>
__device__ __forceinline__ void multiply(Accumulator& d, const Fragment& a, const RightFragment& b) {
  tensor_cores::mma<S>(d.value[0], a.word, b.word[0], b.word[1]);
  tensor_cores::mma<S>(d.value[1], a.word, b.word[2], b.word[3]);
}

// factor times what was summed up, as a factor of the next product.
template <class S, class F>
__device__ __forceinline__ F fragment_of(const Accumulator& sum, float factor = 1) {
  F out;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int left = std::is_same_v<F, RightFragment> ? left_word(w) : w;
    const float *pair = &sum.value[left / 2][left % 2 * 2];
    out.word[w] = pack<S>(pair[0] * factor, pair[1] * factor);
  }
  return out;
}

// A matrix of `columns` 16-bit values a row in shared memory, 64 or a larger power of two. Its rows' pieces of 16 bytes
// are permuted, so that neither eight rows of one piece nor eight pieces of one row meet in a bank.
template <int columns>
struct Tile {
  static constexpr int kPieces = columns / 8;
  static_assert(kPieces >= 8 && (kPieces & (kPieces - 1)) == 0);

  uint16_t* data;

  __device__ __forceinline__ uint16_t* piece(int row, int piece) const {
    return data + (row * kPieces + (piece ^ (row % 8))) * 8;
  }

  // The matrix whose first element is (row, column), multiples of 16.
  __device__ __forceinline__ Fragment fragment(int row, int column) const { return read<Fragment>(row, column, false); }
  __device__ __forceinline__ RightFragment right_fragment(int row, int column) const {
    return read<RightFragment>(row, column, false);
  }
  // The same matrix transposed: its rows are the tile's columns from `column` on.
  __device__ __forceinline__ Fragment transposed(int row, int column) const { return read<Fragment>(row, column, true); }
  __device__ __forceinline__ RightFragment right_transposed(int row, int column) const {
    return read<RightFragment>(row, column, true);
  }

 private:
  // Words are 8 x 8 matrices, whose rows lanes 8 w to 8 w + 7 find. Which of its four each is, the order of words decides
  // and, where it is transposed, the side of the diagonal. A lane's row is piece(row + lane_row, column / 8 + lane_piece):
  // the permutation is an exclusive or, as is the sum of an even number of pieces and one more, so what only the lane
  // decides is worked out once for all of a tile's matrices.
  template <class F>
  __device__ __forceinline__ F read(int row, int column, bool transpose) const {
    const int lane = threadIdx.x % kWarp, low = lane / 8 % 2, high = lane / 16;
    const bool low_is_piece = transpose != std::is_same_v<F, RightFragment>;
    const int lane_row = (low_is_piece ? high : low) * 8 + lane % 8, lane_piece = low_is_piece ? low : high;
    const int lane_start = lane_row * columns + (lane_piece ^ (lane_row % 8)) * 8;
    F out;
    tensor_cores::ldmatrix(out.word, data, (lane_start ^ column) + row * columns, transpose);
    return out;
  }
};

}  // namespace linconv
