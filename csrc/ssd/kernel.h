// The state space dual scan on CPU: arguments of the kernels, for one direction of time or both.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int kSsdChunk = 64;      // frames that one dense product covers
constexpr int kSsdBackwardHeads = 4;  // heads whose gradients of B and C are summed before they leave the cache

// A tensor of frames; strides in elements. A stride of 0 along `direction` shares it between both.
struct SsdTensor {
  void* data;
  DType dtype;
  int64_t direction, batch, time, head, column;  // head: the group, of B and C; column: headdim or dstate

  int64_t at(int64_t d, int64_t row, int64_t frame, int64_t h) const {
    return d * direction + row * batch + frame * time + h * head;
  }
};

struct SsdDirection {
  bool reversed;  // time runs from the last frame to the first
  bool strict;    // y_t leaves out the term of frame t itself
};

// Chunks first … first + count - 1 of a batch, in `ways` directions from first_direction on. The sequences of a batch follow
// one another, each with its chunks in the direction's own order; one without frames has a place all the same.
struct SsdRange {
  const int64_t* starts;  // (sequences + 1): a sequence's first place
  int64_t sequences, first, count;
  int first_direction, ways;

  int64_t sequence_of(int64_t place) const {
    int64_t low = 0, high = sequences;  // starts[low] <= place < starts[high]
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (starts[middle] <= place ? low : high) = middle;
    }
    return low;
  }
  int64_t first_sequence() const { return sequence_of(first); }
  int64_t sequences_here() const { return sequence_of(first + count - 1) + 1 - first_sequence(); }
  // Whether a sequence's first chunk is here, and its last one.
  bool begins(int64_t sequence) const { return first <= starts[sequence]; }
  bool ends(int64_t sequence) const { return starts[sequence + 1] <= first + count; }
  // A sequence's own chunks begin … end - 1 are here.
  int64_t begin(int64_t sequence) const { return begins(sequence) ? 0 : first - starts[sequence]; }
  int64_t end(int64_t sequence) const {
    return (ends(sequence) ? starts[sequence + 1] : first + count) - starts[sequence];
  }
};

// The states of some chunks, in memory, where a task takes one chunk. All in the math dtype.
struct SsdStates : SsdRange {
  int heads;
  int64_t size;  // of a state, as it is padded
  void *entering, *decays;  // (count, ways, heads, size), of gradients leaving; (count, ways, heads), of each whole chunk
  const void* carried_in;   // (ways, heads, size): of a sequence that goes on from the last range, or on to the next
  void* carried_out;

  // A state is passed on by parts of so many rows.
  static constexpr int kRows = 16;
  static int parts(int rows) { return (rows + kRows - 1) / kRows; }
  int64_t at(int direction, int head) const { return (direction - first_direction) * int64_t(heads) + head; }
  int64_t at(int64_t sequence, int64_t chunk, int direction, int head) const {
    return (starts[sequence] + chunk - first) * ways * heads + at(direction, head);
  }
};

// What is done with tasks. Where each takes all frames of its sequence there is but one stage. Where that would leave
// threads idle, a task takes one chunk, and a stage needs all of those before it. Results are the same, bit for bit.
enum class SsdStage {
  kWhole,
  kAdded,            // what each chunk adds to the state
  kPassed,           // the states that enter each chunk, from one to the next
  kGradientsAdded,   // backward: likewise, of the gradients of the states that leave each chunk
  kGradientsPassed,
  kResults,          // what a chunk's frames get, of one direction
  kFinished,         // what was summed is rounded, padding is zeroed; backward: what chunks add to dA, dD, ddt_bias is summed
};

struct SsdArgs {
  const Span* spans;
  int64_t sequences;
  int64_t frames;  // L; what lies behind a span up to here is padding, unless packed
  bool packed;
  int heads, groups, headdim, dstate;
  int directions;
  SsdDirection direction[2];
  bool summed;   // both directions go into one y
  bool shifted;  // each direction's result lands one of its own steps later
  SsdTensor x, dt, B, C;
  // (directions, heads) in the math dtype; D and dt_bias may be null.
  const void *A, *D, *dt_bias;
  bool dt_softplus;
  double dt_min, dt_max;
  const void* initial_states;  // (sequences, heads, headdim, dstate) in the math dtype, or null; one direction only
  // How the work is cut into tasks; forward results do not depend on it.
  int head_block;    // heads of a group that one task takes, so that they share its products of B and C
  int column_block;  // columns of headdim that one task takes
  // Where a task takes one chunk.
  SsdStates states;
  SsdRange pieces;  // of all frames, padding included, as long as chunks: for kFinished
  void* summed_in;  // as the result, in the math dtype, where directions are summed before they are rounded; or null

  int64_t length(int64_t sequence) const { return spans[sequence].end - spans[sequence].begin; }
  int64_t padding(int64_t sequence) const { return packed ? 0 : frames - spans[sequence].end; }
  bool padded() const {
    for (int64_t s = 0; s < sequences; ++s)
      if (padding(s) > 0) return true;
    return false;
  }
  int64_t longest() const {
    int64_t longest = 0;
    for (int64_t s = 0; s < sequences; ++s) longest = length(s) > longest ? length(s) : longest;
    return longest;
  }
  int64_t chunks_of(int64_t length) const { return (length + kSsdChunk - 1) / kSsdChunk; }
  // Whether a result of that dtype is summed in memory of its own and then rounded.
  bool staged(DType dtype) const { return summed && directions == 2 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16); }
  int group_heads() const { return heads / groups; }
  int head_blocks() const { return (group_heads() + head_block - 1) / head_block; }
  int column_blocks() const { return (headdim + column_block - 1) / column_block; }
  int blocks() const { return groups * head_blocks() * column_blocks(); }
  int64_t tasks() const { return sequences * (summed ? 1 : directions) * blocks(); }
  int64_t tasks_of_chunks(const SsdRange& range) const { return range.count * range.ways * blocks(); }
  int64_t entries_of_states(const SsdRange& range) const { return range.count * range.ways * heads * headdim * dstate; }
  int64_t tasks_of_rows(const SsdRange& range, int rows) const {
    return range.sequences_here() * range.ways * heads * SsdStates::parts(rows);
  }
};

struct SsdForwardArgs : SsdArgs {
  SsdTensor y;
  void* final_states;  // as initial_states, or null
};

// Partial results carry the math dtype and are summed by the caller in a fixed order.
struct SsdBackwardArgs : SsdArgs {
  SsdTensor dy;
  const void* dfinal_states;  // as initial_states, or null
  SsdTensor dx;               // per direction unless summed
  SsdTensor ddt;              // (directions, batch, L, heads)
  SsdTensor dB, dC;           // (directions, batch, L, groups, dstate) for each block of heads
  int64_t dBC_block;          // stride between blocks of heads
  void *dA, *dD, *ddt_bias;   // (sequences, directions, heads); dD and ddt_bias may be null
  void* dinitial_states;      // as initial_states, or null
  // Where a task takes one chunk.
  SsdStates dstates;          // gradients of the states that leave each chunk
  double* sums;               // (all chunks, directions, heads, 3): what each adds to dA, dD and ddt_bias
};

LINCONV_KERNEL(void, ssd_forward, const SsdForwardArgs& args, SsdStage stage, bool fp64, int64_t begin, int64_t end);
LINCONV_KERNEL(void, ssd_backward, const SsdBackwardArgs& args, SsdStage stage, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
