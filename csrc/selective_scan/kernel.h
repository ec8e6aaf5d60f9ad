// The selective scan of Mamba on CPU: every channel has a state of dstate numbers, each with a rate of its own.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int64_t kSelectiveChannels = 64;  // of a task at most; gradients of B and C are summed over so many at once

// Frames are (1, batch, L, channels), B and C (groups, batch, L, dstate), states (sequences, channels, dstate).
struct SelectiveScanArgs {
  const Span* spans;
  int64_t sequences, frames;
  bool packed;
  int64_t channels, groups, dstate;
  int64_t block;  // channels of a task
  View<4> x, dt, z, B, C;  // z may be absent
  View<2> A;               // (channels, dstate); it, D, dt_bias and states are in the math type
  View<1> D, dt_bias;      // may be absent
  bool dt_softplus, reverse;
  View<3> initial_states;  // may be absent
  // Forward
  View<4> y;
  View<3> final_states;
  // Backward; what belongs to an absent argument is absent
  View<4> dy, dx, ddt, dz;
  View<3> dfinal_states, dinitial_states;
  void *dA, *dD, *ddt_bias;  // parts in the math type: (sequences, channels, dstate), (sequences, channels)
  void *dB, *dC;             // and (blocks of a group, batch, L, groups, dstate)

  int64_t group_channels() const { return channels / groups; }
  int64_t group_blocks() const { return (group_channels() + block - 1) / block; }
  int64_t tasks() const { return sequences * groups * group_blocks(); }
  int64_t longest() const {
    int64_t length = 0;
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t own = spans[i].end - spans[i].begin;
      if (own > length) length = own;
    }
    return length;
  }
};

// Tasks are sequences x groups x blocks of a group's channels. Math in double if x is, in float otherwise.
LINCONV_KERNEL(void, selective_scan_forward, const SelectiveScanArgs& args, int64_t begin, int64_t end);
LINCONV_KERNEL(void, selective_scan_backward, const SelectiveScanArgs& args, int64_t begin, int64_t end);

}  // namespace linconv
