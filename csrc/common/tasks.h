// Loops over a kernel's tasks, on torch's threads. For cpu.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace linconv {

// How many of `tasks`, of so many operations in all, a thread should have at least. Threads that others keep from running
// are waited for, milliseconds on a busy machine, so what is done in microseconds is left to one.
inline int64_t grain(int64_t tasks, int64_t operations) {
  constexpr int64_t kLeast = 1 << 16;
  return operations >= tasks * kLeast ? 1 : (tasks * kLeast + operations) / std::max<int64_t>(operations, 1);
}

// A kernel with its arguments: run(begin, end) does so many of `count` tasks, which depend on nothing of each other's.
struct Tasks {
  int64_t count;
  std::function<void(int64_t begin, int64_t end)> run;
  int64_t grain = 1;
};

// The tasks of kernels alike, one kernel's behind another's.
inline Tasks chain(std::vector<Tasks> parts) {
  int64_t count = 0;
  for (const Tasks& part : parts) count += part.count;
  return {count, [parts = std::move(parts)](int64_t begin, int64_t end) {
            for (const Tasks& part : parts) {
              const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, part.count);
              if (first < last) part.run(first, last);
              begin -= part.count, end -= part.count;
            }
          }};
}

inline void run(const Tasks& tasks) { torch::stable::parallel_for(0, tasks.count, tasks.grain, tasks.run); }

// Kernels that differ but depend on nothing of each other's either: each thread takes its share of every one.
inline void run_together(const std::vector<Tasks>& all) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (const Tasks& tasks : all) {
      const int64_t first = tasks.count * begin / threads, last = tasks.count * end / threads;
      if (first < last) tasks.run(first, last);
    }
  });
}

}  // namespace linconv
