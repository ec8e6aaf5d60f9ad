// Where the sequences of a batch lie, as CUDA kernels find them: read from seq_lens or cu_seqlens on the device, so that
// a call never waits for it. Values that do not fit (the host cannot see them) are cut to the tensor: nothing outside it
// is read or written for them.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace linconv {

// A chunk of a sequence, both by number.
struct SequenceChunk {
  int64_t sequence, chunk;
};

struct Sequences {
  const void* bounds;  // seq_lens or cu_seqlens, int64 if wide, else int32; null: every row is one whole sequence
  int64_t stride;
  bool wide, packed;
  int64_t count;   // of sequences
  int64_t frames;  // L

  LINCONV_HOST_DEVICE int64_t bound(int64_t i) const {
    const int64_t value = wide ? static_cast<const int64_t*>(bounds)[i * stride] : static_cast<const int32_t*>(bounds)[i * stride];
    return value < 0 ? 0 : value < frames ? value : frames;
  }

  // Sequence i of `count`.
  LINCONV_HOST_DEVICE Span sequence(int64_t i) const {
    if (packed) {
      const int64_t begin = bound(i), end = bound(i + 1);
      return {0, begin, begin < end ? end : begin};
    }
    return {i, 0, bounds == nullptr ? frames : bound(i)};
  }

  // Where chunks' intermediate results stand: sequence i has one slot for each of its chunks from first_slot(i, chunk) on,
  // of slots(chunk) in all. Those of packed sequences are found without a sum over the sequences before.
  LINCONV_HOST_DEVICE int64_t first_slot(int64_t i, int64_t chunk) const {
    return packed ? bound(i) / chunk + i : i * ((frames + chunk - 1) / chunk);
  }
  LINCONV_HOST_DEVICE int64_t slots(int64_t chunk) const {
    return packed ? frames / chunk + count : count * ((frames + chunk - 1) / chunk);
  }

  // The sequence that slot belongs to, and which of its chunks stands there; a sequence may have no such chunk. Of packed ones
  // the search is as in holding().
  LINCONV_HOST_DEVICE SequenceChunk chunk_of_slot(int64_t slot, int64_t chunk) const {
    if (!packed) {
      const int64_t chunks = (frames + chunk - 1) / chunk;
      return {slot / chunks, slot % chunks};
    }
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_slot(middle, chunk) <= slot ? low : high) = middle;
    }
    return {low, slot - first_slot(low, chunk)};
  }

  // The sequence that holds frame t of a row: begin <= t < end. Where it is padding, which then runs to the end of the row,
  // end <= t.
  LINCONV_HOST_DEVICE Span holding(int64_t row, int64_t t) const {
    if (!packed) return sequence(row);
    int64_t low = 0, high = count;  // the last sequence that begins at or before t is in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (bound(middle) <= t ? low : high) = middle;
    }
    return count > 0 ? sequence(low) : Span{0, 0, 0};
  }
};

}  // namespace linconv
