// Short depthwise convolution over time, both directions in one pass over an input they share.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace linconv {

constexpr int kMaxConvWidth = 8;

constexpr int64_t kConvFrames = 256;    // of a block at most
constexpr int64_t kConvChannels = 256;  // a task is one block of frames times this many channels

// Direction i runs mirrored in time if reverse != (i == 1).
struct ConvArgs {
  int64_t directions, channels, width, lookahead;
  bool reverse, silu;
  bool shared;          // x has one direction, read by all
  View<4> x;            // (1 or directions, batch, L, channels)
  View<3> weight;       // (directions, channels, width)
  View<2> bias;         // (directions, channels), or data == nullptr
  View<4> y;            // (directions, batch, L, channels)
  View<4> grad_y;       // as y; backward only, as is all that follows
  View<4> grad_x;       // as x
  View<3> grad_weight;  // as weight
  View<2> grad_bias;    // as bias, never nullptr
  void* partial;        // (blocks, directions, width + 1, channels) in the math type: sums over each block's own frames
  const Block* blocks;
  int64_t block_count, channel_blocks;
};

// Tasks are block_count * channel_blocks, channel block fastest. Math in double if x is, in float otherwise.
LINCONV_KERNEL(void, short_conv_forward, const ConvArgs& args, int64_t begin, int64_t end);
// Writes grad_x and partial.
LINCONV_KERNEL(void, short_conv_backward, const ConvArgs& args, int64_t begin, int64_t end);
// Adds up partial in the order of the blocks. Tasks are channel_blocks.
LINCONV_KERNEL(void, short_conv_reduce, const ConvArgs& args, int64_t begin, int64_t end);

}  // namespace linconv
