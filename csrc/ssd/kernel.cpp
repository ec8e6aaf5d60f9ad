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

}  // namespace

void ssd_forward(const SsdForwardArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<Forward<double>>(args, begin, end) : run<Forward<float>>(args, begin, end);
}

void ssd_backward(const SsdBackwardArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<Backward<double>>(args, begin, end) : run<Backward<float>>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
