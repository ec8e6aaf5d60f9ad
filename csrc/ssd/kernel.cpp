// The state space dual scan, per instruction set: see forward.h and backward.h.
#include "ssd/kernel.h"

#include "ssd/backward.h"
#include "ssd/forward.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class States, class Pass, class Args>
void run(const Args& args, SsdStage stage, int64_t begin, int64_t end) {
  const auto tasks = [&](auto& pass) {
    for (int64_t index = begin; index < end; ++index) pass.run(stage, index);
  };
  const bool scratch = stage == SsdStage::kWhole || stage == SsdStage::kAdded || stage == SsdStage::kGradientsAdded ||
                       stage == SsdStage::kResults;
  if (scratch) {
    Pass pass(args, stage);
    tasks(pass);
  } else {
    States states(args);
    tasks(states);
  }
}

}  // namespace

void ssd_forward(const SsdForwardArgs& args, SsdStage stage, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<ForwardStates<double>, Forward<double>>(args, stage, begin, end)
       : run<ForwardStates<float>, Forward<float>>(args, stage, begin, end);
}

void ssd_backward(const SsdBackwardArgs& args, SsdStage stage, bool fp64, int64_t begin, int64_t end) {
  fp64 ? run<BackwardStates<double>, Backward<double>>(args, stage, begin, end)
       : run<BackwardStates<float>, Backward<float>>(args, stage, begin, end);
}

}  // namespace linconv::LINCONV_ISA
