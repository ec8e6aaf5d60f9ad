// Launches of Triton kernels that linconv/ops/triton_program.py wrote down, one after the other. It says what the words are.
#include <cstdint>

namespace {

constexpr uint64_t kMostParameters = 128;
constexpr int kInvalidValue = 1;  // CUDA_ERROR_INVALID_VALUE

// cuLaunchKernel. Its address is given: this library is built, and loaded, without CUDA.
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_memory, void* stream, void** parameters,
                             void** extra);

}  // namespace

// Runs `count` launches, whose addresses are counted from `starts`. Returns the first error of the CUDA driver, and how
// many launches went before it in `done`.
extern "C" __attribute__((visibility("default"))) int linconv_launch(LaunchKernel launch_kernel, const uint64_t* words,
                                                                     uint64_t count, const uint64_t* starts, void* stream,
                                                                     uint64_t* done) {
  for (*done = 0; *done < count; ++*done) {
    const auto [function, grid_x, grid_y, grid_z, threads, shared_memory, parameters, addresses] =
        *reinterpret_cast<const uint64_t(*)[8]>(words);
    words += 8;
    if (parameters > kMostParameters) {
      return kInvalidValue;
    }
    uint64_t values[kMostParameters];  // the driver reads as many of a word's first bytes as the parameter has
    void* pointers[kMostParameters];
    for (uint64_t i = 0; i < parameters; ++i) {
      values[i] = *words++;
      pointers[i] = &values[i];
    }
    for (uint64_t i = 0; i < addresses; ++i, words += 2) {
      values[words[0]] += starts[words[1]];
    }
    const int error = launch_kernel(reinterpret_cast<void*>(function), grid_x, grid_y, grid_z, threads, 1, 1, shared_memory,
                                    stream, pointers, nullptr);
    if (error != 0) {
      return error;
    }
  }
  return 0;
}
