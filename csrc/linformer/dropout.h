// Which attention weights dropout keeps: a hash of the seed and of where a weight stands, so that backward, another
// backend and the reference in Python draw the same.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace linconv {

struct Dropout {
  uint32_t threshold = 0;  // weights whose hash lies below are dropped; 0: none
  double keep_scale = 1;   // 1 / (1 - p)
  uint64_t seed = 0;       // on a GPU kernels read it themselves
};

constexpr uint32_t kDropoutStep = 0x9e3779b9U;  // 2^32 over the golden ratio

// C. Wellons' hash "lowbias32": a bijection of 32 bits in which every bit in changes every bit out about half the time.
LINCONV_HOST_DEVICE static inline uint32_t dropout_mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// The two keys of one query: its row of the batch and head, counted as row * heads + head, and its frame.
struct DropoutKeys {
  uint32_t first, second;
};
LINCONV_HOST_DEVICE static inline DropoutKeys dropout_keys(uint64_t seed, int64_t row_and_head, int64_t frame) {
  const uint32_t place = dropout_mix(static_cast<uint32_t>(row_and_head) ^ static_cast<uint32_t>(seed));
  const uint32_t first = dropout_mix(place ^ static_cast<uint32_t>(frame));
  // Mixed twice: for a seed whose upper half is zero, once would undo what key 0 is mixed with.
  return {first, dropout_mix(dropout_mix(first ^ static_cast<uint32_t>(seed >> 32)) + kDropoutStep)};
}

LINCONV_HOST_DEVICE static inline uint32_t dropout_hash(DropoutKeys keys, uint32_t key_index) {
  return dropout_mix(dropout_mix(key_index * kDropoutStep + keys.first) ^ keys.second);
}

}  // namespace linconv
