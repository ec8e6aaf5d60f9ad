// What a student learns from its teacher: mean squared errors of hidden states, all layers in one launch, and
// KL(teacher || student) of the softened outputs.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"
#include "distillation_loss/softmax.h"

namespace linconv {

constexpr int64_t kLossFrames = 32;    // of a task on hidden states at most
constexpr int64_t kLossColumns = 1024;  // of logits at a time: the two sides' stay in L1 between their two passes

// One layer's hidden states, (batch, L, d) each.
struct LayerPair {
  View<3> student, teacher;
  View<3> grad_student, grad_teacher;  // without data where not wanted
  double scale;                        // of the gradients: upstream * 2 / (rows that count * d)
};

struct LayerArgs {
  const LayerPair* layers;
  int64_t layer_count;
  bool layer_norm, in_double;  // the math type
  bool stream;                 // gradients past the caches, being larger than these
  const uint8_t* valid;        // (batch, L); null: all
  const Block* blocks;         // of at most kLossFrames frames; the tasks are layers * blocks
  int64_t block_count;
  double* partial;  // (layers, blocks, 2): sums over rows of their mean squared error and their cosine
};

// Statistics are of logits divided by the temperature.
struct LogitArgs {
  View<3> student, teacher;            // (batch, L, classes); tasks are batch * L rows
  View<3> grad_student, grad_teacher;  // backward only; without data where not wanted
  bool in_double;
  const uint8_t* valid;    // (batch, L); null: all
  const double* before;    // (rows, kStatistics) of the classes before these, or null
  double* statistics;      // (rows, kStatistics)
  double temperature;
  const double* scale;     // (1) or (rows): of the gradients
  int64_t scale_stride;    // 0 or 1
};

// Elements of the math type that one call of a kernel needs as scratch.
static inline int64_t layer_scratch(const LayerArgs& args) {
  int64_t widest = 0;
  for (int64_t i = 0; i < args.layer_count; ++i)
    if (args.layers[i].student.size[2] > widest) widest = args.layers[i].student.size[2];
  return 4 * widest;
}
static inline int64_t logit_scratch() { return 4 * (kLossColumns + 64); }

LINCONV_KERNEL(void, layers_forward, const LayerArgs& args, void* scratch, int64_t begin, int64_t end);
LINCONV_KERNEL(void, layers_backward, const LayerArgs& args, void* scratch, int64_t begin, int64_t end);
LINCONV_KERNEL(void, logits_forward, const LogitArgs& args, void* scratch, int64_t begin, int64_t end);
LINCONV_KERNEL(void, logits_backward, const LogitArgs& args, void* scratch, int64_t begin, int64_t end);

}  // namespace linconv
