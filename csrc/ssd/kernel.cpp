// The state space dual scan, per instruction set: see forward.h and backward.h.
#include "ssd/kernel.h"

#include "ssd/backward.h"
#include "ssd/forward.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class Pass, class Args>
void run(const Args& args, int64_t begin, int64_t end) {
  Pass pass(args);
  for (int64_t index = begin; index < end; ++index) pass.run(Task(args, index));
}

template <class T>
void sum_parts(const SsdSumArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t block = 512;
  alignas(64) T total[block];
  for (; begin < end; begin += block) {
    const int64_t n = end - begin < block ? end - begin : block;
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    for (int64_t a = 0; a < args.outer; ++a)
      for (int64_t b = 0; b < args.inner; ++b) {
        const T* part = static_cast<const T*>(args.parts) + a * args.outer_stride + b * args.inner_stride + begin;
        for (int64_t i = 0; i < n; ++i) total[i] += part[i];
      }
    store_row(offset(args.out, args.dtype, begin), args.dtype, 1, n, total);
  }
}

}  // namespace

void ssd_forward(const SsdForwardArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<Forward<double>>(args, begin, end) : run<Forward<float>>(args, begin, end);
}

void ssd_backward(const SsdBackwardArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<Backward<double>>(args, begin, end) : run<Backward<float>>(args, begin, end);
}

void ssd_sum(const SsdSumArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? sum_parts<double>(args, begin, end) : sum_parts<float>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
