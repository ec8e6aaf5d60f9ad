// Softmaxes of a row of logits, as far as its columns have been seen: the same numbers on CPU and CUDA.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace linconv {

// Of one side: the largest logit, and the sum of exp(. - largest).
struct Softmax {
  double largest = -__builtin_inf(), total = 0;
};

// Of both, with w = sum over columns of exp(t - largest t) ((t - largest t) - (s - largest s)). With shifts, nothing large
// is ever subtracted from something large.
struct Softmaxes {
  Softmax s, t;
  double w = 0;
};

LINCONV_HOST_DEVICE static inline double shift(const Softmax& x) {
  return x.largest == -__builtin_inf() ? 0 : x.largest;  // -inf - -inf is NaN
}

// Takes in the largest of more columns; returns the factor on what was summed before, and by how much the shift rose.
LINCONV_HOST_DEVICE static inline double raise(Softmax& x, double other, double& rise) {
  const double before = shift(x);
  if (other > x.largest) x.largest = other;
  rise = shift(x) - before;
  // Where all were -inf, nothing was summed.
  const double factor = rise == 0 || x.total == 0 ? 1 : std::exp(-rise);
  x.total *= factor;
  return factor;
}

LINCONV_HOST_DEVICE static inline void raise(Softmaxes& x, double largest_s, double largest_t) {
  double rise_s, rise_t;
  raise(x.s, largest_s, rise_s);
  const double before = x.t.total, factor = raise(x.t, largest_t, rise_t);
  // Teacher's columns of a probability that underflows count for nothing, whatever the student gives them.
  x.w = factor == 0 || before == 0 ? 0 : factor * (x.w - before * (rise_t - rise_s));
}

// KL(teacher || student).
LINCONV_HOST_DEVICE static inline double divergence(const Softmaxes& x) {
  return x.w / x.t.total - std::log(x.t.total) + std::log(x.s.total);
}

// What is kept of a row of logits: kStatistics numbers.
constexpr int64_t kStatistics = 6;
LINCONV_HOST_DEVICE static inline Softmaxes load_softmaxes(const double* from) {
  return {{from[0], from[1]}, {from[2], from[3]}, from[4]};
}
LINCONV_HOST_DEVICE static inline void store_statistics(double* to, const Softmaxes& x) {
  to[0] = x.s.largest, to[1] = x.s.total, to[2] = x.t.largest, to[3] = x.t.total, to[4] = x.w;
  to[5] = divergence(x);
}

}  // namespace linconv
