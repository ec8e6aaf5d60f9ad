// Operators that walk over frames: how the frames are cut into tasks, and rows of channels in the math type.
#pragma once

#include <cstdint>

#include "common/vec.h"
#include "common/view.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
constexpr DType kMathDType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// The frames of one batch row of a tensor (directions, batch, L, channels): n channels from `channel` on.
template <class T>
struct Rows {
  void* start;  // of frame 0
  DType dtype;
  int64_t frame_stride, stride;
  int64_t n;
  bool in_place;  // stored as the math type, contiguously: used where they are

  Rows(const View<4>& view, int64_t direction, int64_t batch, int64_t channel, int64_t n)
      : start(at(view, direction, batch, 0, channel)),
        dtype(view.dtype),
        frame_stride(view.stride[2]),
        stride(view.stride[3]),
        n(n),
        in_place(stride == 1 && dtype == kMathDType<T>) {}

  void* row(int64_t t) const { return offset(start, dtype, t * frame_stride); }
  const T* read(int64_t t, T* buffer) const {
    if (in_place) return static_cast<const T*>(row(t));
    load_row(row(t), dtype, stride, n, buffer);
    return buffer;
  }
  // Where to compute frame t before `written`.
  T* target(int64_t t, T* buffer) const { return in_place ? static_cast<T*>(row(t)) : buffer; }
  void written(int64_t t, const T* result) const {
    if (!in_place) store_row(row(t), dtype, stride, n, result);
  }
  void clear(int64_t t) const {
    const T zeros[64] = {};
    for (int64_t c = 0; c < n; c += 64)
      store_row(offset(row(t), dtype, c * stride), dtype, stride, min<int64_t>(64, n - c), zeros);
  }
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
