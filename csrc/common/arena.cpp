#include <cstddef>

#include "common/tensor.h"

namespace linconv {

// Compiled once, for the baseline: what is thrown is no matter of an instruction set.
[[noreturn]] void out_of_memory(size_t bytes) {
  require(false, "a task wanted ", bytes, " bytes of scratch, which there is no memory for");
  __builtin_unreachable();
}

}  // namespace linconv
