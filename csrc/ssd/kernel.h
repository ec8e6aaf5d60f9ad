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

  int64_t length(int64_t sequence) const { return spans[sequence].end - spans[sequence].begin; }
  int64_t padding(int64_t sequence) const { return packed ? 0 : frames - spans[sequence].end; }
  int64_t longest() const {
    int64_t longest = 0;
    for (int64_t s = 0; s < sequences; ++s) longest = length(s) > longest ? length(s) : longest;
    return longest;
  }
  int group_heads() const { return heads / groups; }
  int head_blocks() const { return (group_heads() + head_block - 1) / head_block; }
  int column_blocks() const { return (headdim + column_block - 1) / column_block; }
  int64_t tasks() const {
    return sequences * (summed ? 1 : directions) * groups * head_blocks() * column_blocks();
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
};

LINCONV_KERNEL(void, ssd_forward, const SsdForwardArgs& args, bool fp64, int64_t begin, int64_t end);
LINCONV_KERNEL(void, ssd_backward, const SsdBackwardArgs& args, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
