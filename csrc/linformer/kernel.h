// Linformer attention in two steps: frames are projected onto r of them, then every frame attends to those r.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"
#include "linformer/dropout.h"

namespace linconv {

// How the sum over a sequence's frames is cut: by its own length alone, so that neither the batch nor the number of
// threads has a say in the bits of a result. Splits of a sequence are of one size, so that tasks are.
constexpr int64_t kLinformerSplitFrames = 512, kLinformerSplits = 16;  // of a split, until there are so many
constexpr int64_t kLinformerSplitMultiple = 64;
// The most splits of any sequence of up to so many frames: rounding may leave the longest with fewer.
LINCONV_HOST_DEVICE static inline int64_t linformer_most_splits(int64_t frames) {
  const int64_t splits = (frames + kLinformerSplitFrames - 1) / kLinformerSplitFrames;
  return splits < 1 ? 1 : splits < kLinformerSplits ? splits : kLinformerSplits;
}
LINCONV_HOST_DEVICE static inline int64_t linformer_split_frames(int64_t length) {
  const int64_t splits = linformer_most_splits(length), even = (length + splits - 1) / splits;
  return (even + kLinformerSplitMultiple - 1) / kLinformerSplitMultiple * kLinformerSplitMultiple;
}
LINCONV_HOST_DEVICE static inline int64_t linformer_splits(int64_t length) {
  const int64_t frames = linformer_split_frames(length);
  return length <= frames ? 1 : (length + frames - 1) / frames;
}

constexpr int kLinformerBlock = 64;     // frames that one task of a gradient over frames takes
constexpr int kLinformerRanks = 128;    // columns of the projection that one task of its gradient takes
constexpr int kLinformerQueries = 512;  // frames of a task of attention

struct LinformerProjectArgs {
  View<4> x;     // (batch, heads, L, headdim)
  View<3> proj;  // (1 or heads, Lmax, r)
  const Span* spans;
  int64_t batch, heads, frames, headdim, rank;
  bool normalize;  // divide by the root of the sequence's length
  int64_t splits;  // the most that any sequence has
  void* parts;     // (batch, heads, splits, r, headdim) in the math type; null where a task takes all splits of a sequence
  View<4> out;     // (batch, heads, r, headdim)

  View<4> grad;   // as out; backward only, as is all that follows
  void* packed;   // (batch, heads, linformer_packed) in the math type: grad as both products read it
  View<4> dx;     // as x
  View<3> dproj;  // as proj

  int64_t length(int64_t row) const { return spans[row].end; }
  int64_t splits_in_memory() const { return parts != nullptr ? splits : 1; }
};

struct LinformerAttendArgs {
  View<4> q;     // (batch, heads, L, headdim)
  View<4> k, v;  // (batch, heads, r, headdim)
  const Span* spans;
  int64_t batch, heads, frames, headdim, rank;
  double scale;
  Dropout dropout;
  View<4> out;  // as q

  int64_t splits;  // backward only, as is all that follows
  View<4> grad;    // as q
  View<4> dq;      // as q
  View<4> dk, dv;  // as k and v
  void *dk_parts, *dv_parts;  // (batch, heads, splits, r, headdim) in the math type

  int64_t query_blocks() const { return (frames + kLinformerQueries - 1) / kLinformerQueries; }
  int64_t length(int64_t row) const { return spans[row].end; }
};

// out = factor * the sum of the parts of each row and head, in the order of the splits.
struct LinformerSumArgs {
  const void* parts;
  View<4> out;
  const Span* spans;
  int64_t heads, splits, rank, headdim;
  bool normalize;
  bool uncut;  // whether rows in one part are summed too, or written by their task already
};

// An upper bound, for every instruction set, of the elements that one head's gradient takes, packed.
static inline int64_t linformer_packed(int64_t rank, int64_t headdim) {
  return rank * (headdim + 64) + (rank + 64) * (headdim + 64);
}

// Tasks: rows, splits where they have parts, heads.
LINCONV_KERNEL(void, linformer_project, const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: rows and heads.
LINCONV_KERNEL(void, linformer_sum, const LinformerSumArgs& args, bool fp64, int64_t begin, int64_t end);
LINCONV_KERNEL(void, linformer_pack, const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: rows and blocks of frames. Writes dx.
LINCONV_KERNEL(void, linformer_unproject, const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: heads of the projection, blocks of its frames, blocks of its columns. Writes dproj.
LINCONV_KERNEL(void, linformer_project_weights, const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: rows, heads, blocks of queries.
LINCONV_KERNEL(void, linformer_attend, const LinformerAttendArgs& args, bool fp64, int64_t begin, int64_t end);
// Tasks: rows, heads, splits. Writes dq and the parts.
LINCONV_KERNEL(void, linformer_attend_backward, const LinformerAttendArgs& args, bool fp64, int64_t begin, int64_t end);

}  // namespace linconv
