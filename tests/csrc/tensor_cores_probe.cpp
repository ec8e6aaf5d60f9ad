// csrc/common/tensor_cores.h and what it takes of cuda_on_host.h behind C functions on arrays, for tensor_cores.py.
// One warp runs each; what lanes hold is (32, words or values).
#include "common/tensor_cores.h"

using namespace linconv;

namespace {

int lane() { return static_cast<int>(threadIdx.x); }

template <class F>
void warp(int64_t shared_bytes, F&& work) {
  cuda_on_host::run(dim3(1), kWarp, shared_bytes, work);
}

template <class F>
void with_half(bool bfloat16, F&& f) {
  bfloat16 ? f(BFloat16{}) : f(Float16{});
}

template <int columns>
void load(const uint16_t* matrix, int row, int column, bool transposed, bool right, Fragment* out) {
  warp(64 * columns * 2, [&] {
    const Tile<columns> tile{shared_memory<uint16_t>()};
    for (int r = lane(); r < 64; r += kWarp)
      for (int p = 0; p < columns / 8; ++p) std::memcpy(tile.piece(r, p), matrix + r * columns + p * 8, 16);
    __syncthreads();
    Fragment& own = out[lane()];
    if (right) {
      const RightFragment f = transposed ? tile.right_transposed(row, column) : tile.right_fragment(row, column);
      for (int w = 0; w < 4; ++w) own.word[left_word(w)] = f.word[w];
    } else {
      own = transposed ? tile.transposed(row, column) : tile.fragment(row, column);
    }
  });
}

}  // namespace

#pragma GCC visibility push(default)  // for ctypes
extern "C" {

void probe_mma(const uint32_t (*a)[4], const uint32_t (*b)[2], float (*d)[4], bool bfloat16) {
  with_half(bfloat16, [&](auto storage) {
    warp(0, [&] { tensor_cores::mma<decltype(storage)>(d[lane()], a[lane()], b[lane()][0], b[lane()][1]); });
  });
}

// Lane's row is the eight values from starts[lane] of memory on.
void probe_ldmatrix(const uint16_t* memory, const int32_t* starts, uint32_t (*out)[4], bool transposed) {
  warp(0, [&] { tensor_cores::ldmatrix(out[lane()], memory, starts[lane()], transposed); });
}

// Lane's 16 bytes from one place to another, of which it copies bytes[lane]; `early` is what is there before they are
// waited for.
void probe_copy(const uint4* from, const int32_t* bytes, uint4* early, uint4* late) {
  warp(kWarp * sizeof(uint4), [&] {
    uint4* to = shared_memory<uint4>() + lane();
    copy_later(to, from + lane(), bytes[lane()]);
    early[lane()] = *to;
    wait_for_copies();
    late[lane()] = *to;
  });
}

void probe_load(const uint16_t* matrix, int columns, int row, int column, bool transposed, bool right, Fragment* out) {
  (columns == 64 ? load<64> : load<128>)(matrix, row, column, transposed, right, out);
}

void probe_multiply(const Fragment* a, const Fragment* b, Accumulator* d, bool bfloat16) {
  with_half(bfloat16, [&](auto storage) {
    warp(0, [&] {
      RightFragment right;
      for (int w = 0; w < 4; ++w) right.word[w] = b[lane()].word[left_word(w)];
      multiply<decltype(storage)>(d[lane()], a[lane()], right);
    });
  });
}

void probe_fragment_of(const Accumulator* sum, float factor, Fragment* out, bool bfloat16, bool right) {
  with_half(bfloat16, [&](auto storage) {
    using S = decltype(storage);
    warp(0, [&] {
      if (right) {
        const auto f = fragment_of<RightFragment>(words_of(fragment_of<S, RightFragment>(sum[lane()], factor)));
        for (int w = 0; w < 4; ++w) out[lane()].word[left_word(w)] = f.word[w];
      } else {
        out[lane()] = fragment_of<Fragment>(words_of(fragment_of<S, Fragment>(sum[lane()], factor)));
      }
    });
  });
}

float probe_unpack(uint32_t word, int half, bool bfloat16) {
  return bfloat16 ? unpack<BFloat16>(word, half) : unpack<Float16>(word, half);
}

// Where (row, piece) of a tile is, in pieces of 16 bytes.
int probe_piece(int columns, int row, int piece) {
  uint16_t memory[1];
  return static_cast<int>((columns == 64 ? Tile<64>{memory}.piece(row, piece) : Tile<128>{memory}.piece(row, piece)) - memory) / 8;
}

int64_t probe_first_slot(const int64_t* bounds, int64_t count, int64_t frames, bool packed, int64_t i, int64_t chunk, int64_t* slots) {
  const Sequences sequences{bounds, 1, true, packed, count, frames};
  *slots = sequences.slots(chunk);
  return sequences.first_slot(i, chunk);
}

}  // extern "C"
#pragma GCC visibility pop
