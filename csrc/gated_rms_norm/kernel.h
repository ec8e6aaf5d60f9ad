// RMS norm after a SiLU gate: y = x silu(z), out = y rsqrt(mean(y^2) + eps) weight, the mean over groups of channels.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int64_t kNormFrames = 64;  // of a block at most

struct NormArgs {
  int64_t directions, channels, group_size;
  double eps;
  View<4> x, z;         // (1 or directions, batch, L, channels); 1: shared by all directions
  View<2> weight;       // (directions, channels)
  View<4> y;            // (directions, batch, L, channels)
  View<4> grad_y;       // as y; backward only, as is all that follows
  View<4> grad_x;       // as x
  View<4> grad_z;       // as z
  View<2> grad_weight;  // as weight
  void* partial;        // (blocks, directions, channels) in the math type: sums over each block's own frames
  const Block* blocks;
  int64_t block_count;
};

// Elements of the math type that one call of a kernel needs as scratch.
static inline int64_t norm_scratch(const NormArgs& args) { return (2 * args.directions + 7) * args.channels; }

// Tasks are blocks. Math in double if x is, in float otherwise.
LINCONV_KERNEL(void, gated_rms_norm_forward, const NormArgs& args, void* scratch, int64_t begin, int64_t end);
// Writes grad_x, grad_z and partial.
LINCONV_KERNEL(void, gated_rms_norm_backward, const NormArgs& args, void* scratch, int64_t begin, int64_t end);
// Adds up partial in the order of the blocks. Tasks are channels.
LINCONV_KERNEL(void, gated_rms_norm_reduce, const NormArgs& args, int64_t begin, int64_t end);

}  // namespace linconv
