// Loops over a kernel's tasks, on torch's threads. For cpu.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace linconv {

// A kernel and its arguments: run(begin, end) does tasks begin to end - 1 of `count` independent ones.
struct Tasks {
  int64_t count;
  std::function<void(int64_t begin, int64_t end)> run;
  // Roughly, of all tasks together; left out where each task has millions.
  int64_t operations = std::numeric_limits<int64_t>::max();

  // The number of tasks that together have `least` operations.
  int64_t with(int64_t least) const {
    return operations / least >= count ? 1 : (count * least + operations) / std::max<int64_t>(operations, 1);
  }
};

// Several kernels as one: the tasks of the first, then those of the second, and so on.
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

// A thread's share of a kernel's tasks. The thread, and others that help it, take it piece by piece.
class alignas(64) Share {
 public:
  void assign(const Tasks& tasks, int64_t thread, int64_t threads) {
    constexpr int64_t kPieces = 8;
    constexpr int64_t kLeast = 1 << 23;  // operations of a piece, so that what a kernel sets up at its beginning is little
    next_ = tasks.count * thread / threads;
    end_ = tasks.count * (thread + 1) / threads;
    piece_ = std::max(tasks.with(kLeast), (end_ - next_ + kPieces - 1) / kPieces);
  }
  void work(const Tasks& tasks) {
    while (next_.load(std::memory_order_relaxed) < end_) {
      const int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (begin < end_) tasks.run(begin, std::min(begin + piece_, end_));
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t end_ = 0, piece_ = 1;
};

// Runs independent kernels at once. A thread first does its own share of each, the same tasks at every call, which
// therefore find their data in its caches. Then it helps threads that are behind: cores differ in speed, tasks in length,
// and other programs take time of some cores.
inline void run_together(std::span<const Tasks> all) {
  // Operations that are worth a thread: on a busy machine one may start milliseconds late, and all wait for it, so one
  // thread alone does what takes microseconds.
  constexpr int64_t kLeast = 1 << 16;
  int64_t threads = 0;
  for (const Tasks& tasks : all) {
    const int64_t least = tasks.with(kLeast);
    threads = std::max(threads, (tasks.count + least - 1) / least);
  }
  threads = std::min<int64_t>(threads, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (const Tasks& tasks : all)
      if (tasks.count > 0) tasks.run(0, tasks.count);
    return;
  }
  std::vector<Share> shares(all.size() * threads);
  for (size_t i = 0; i < all.size(); ++i)
    for (int64_t thread = 0; thread < threads; ++thread) shares[i * threads + thread].assign(all[i], thread, threads);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (size_t i = 0; i < all.size(); ++i) shares[i * threads + own].work(all[i]);
    for (size_t i = 0; i < all.size(); ++i)
      for (int64_t behind = 1; behind < threads; ++behind) shares[i * threads + (begin + behind) % threads].work(all[i]);
  };
  // torch would report that a thread threw, but not what.
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline void run_together(std::initializer_list<Tasks> all) { run_together(std::span(all.begin(), all.size())); }

inline void run(const Tasks& tasks) { run_together(std::span(&tasks, 1)); }

}  // namespace linconv
