// How the work of a scan is cut among threads. For cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/tasks.h"
#include "common/tensor.h"
#include "ssd/kernel.h"

namespace linconv {

// Expected times, as parts of what one head of a chunk takes. A task pays once for the products of B and C that its heads
// share. Where tasks take one chunk, it is read twice and its states are written and read: so much more, for each head.
constexpr double kSharedCost = 0.3;
constexpr double kByChunks = 0.25;
constexpr int kMinColumns = 16;

inline double rounds(double tasks) { return std::ceil(tasks / static_cast<double>(torch::stable::get_num_threads())); }

inline double chunks_of_all(const SsdArgs& args) {
  double chunks = 0;
  for (int64_t s = 0; s < args.sequences; ++s) chunks += static_cast<double>(args.chunks_of(args.length(s)));
  return chunks;
}

inline double heads_of_task(const SsdArgs& args) {
  return args.head_block * static_cast<double>(args.column_block) / args.headdim;
}

// Of tasks that take all frames of a sequence: the longest one, or as many as a thread has.
inline double time_of_sequences(const SsdArgs& args, double chunks) {
  const double mean = chunks / static_cast<double>(std::max<int64_t>(args.sequences, 1));
  const double longest = static_cast<double>(args.chunks_of(args.longest()));
  const int directions = args.summed ? args.directions : 1;
  return directions * std::max(longest, mean * rounds(static_cast<double>(args.tasks()))) *
         (kSharedCost + heads_of_task(args));
}

inline double time_of_chunks(const SsdArgs& args, double chunks) {
  return rounds(chunks * args.directions * args.blocks()) * (kSharedCost + (1 + kByChunks) * heads_of_task(args));
}

// Not where there is memory for far more chunks than there are: it is as long for each sequence as for the longest one.
inline bool may_cut_time(const SsdArgs& args, double chunks) {
  const double places = static_cast<double>(args.sequences * args.chunks_of(args.longest()));
  return torch::stable::get_num_threads() > 1 && args.heads > 0 && args.longest() > kSsdChunk && places <= 2 * chunks;
}

// Chooses the cut with the least expected time. Results do not depend on it: every head, column and chunk is computed alike.
// Returns whether tasks take one chunk.
inline bool cut_forward(SsdArgs& args) {
  const double chunks = chunks_of_all(args);
  double best = 0;
  int best_heads = 1, best_columns = args.headdim;
  bool best_by_chunks = false;
  const auto consider = [&](double time, bool by_chunks) {
    if (best == 0 || time < best)
      best = time, best_heads = args.head_block, best_columns = args.column_block, best_by_chunks = by_chunks;
  };
  for (int columns = args.headdim; columns >= kMinColumns || columns == args.headdim; columns = (columns + 1) / 2) {
    args.column_block = columns;
    for (args.head_block = args.group_heads(); args.head_block >= 1; --args.head_block) {
      consider(time_of_sequences(args, chunks), false);
      if (columns == args.headdim && may_cut_time(args, chunks)) consider(time_of_chunks(args, chunks), true);
    }
    if (columns <= kMinColumns) break;
  }
  args.head_block = best_heads;
  args.column_block = best_columns;
  return best_by_chunks;
}

// Backward's heads of a task are given. Returns whether tasks take one chunk.
inline bool cut_backward(const SsdArgs& args) {
  const double chunks = chunks_of_all(args);
  return may_cut_time(args, chunks) && time_of_chunks(args, chunks) < time_of_sequences(args, chunks);
}

// How many chunks are computed before the next ones, so that every thread has some and their states stay in its cache.
inline int64_t chunks_at_once(const SsdArgs& args, int ways) {
  constexpr int64_t kTasksOfThread = 4;
  const int64_t tasks = args.sequences * ways * args.blocks();
  const int64_t wanted = (kTasksOfThread * torch::stable::get_num_threads() + tasks - 1) / tasks;
  return std::min(args.chunks_of(args.longest()), wanted);
}

// The frames of a batch, padding included, in pieces as long as chunks.
inline SsdStates pieces_of_frames(const SsdArgs& args) {
  int64_t frames = 0;
  for (int64_t s = 0; s < args.sequences; ++s) frames = std::max(frames, args.length(s) + args.padding(s));
  return {0, args.summed ? 1 : args.directions, 0, args.chunks_of(frames), 0, nullptr, nullptr, nullptr};
}

// Memory of the states of some chunks, of as many directions as are computed at once.
class StatesInMemory {
 public:
  StatesInMemory(const SsdArgs& args, DType math, int ways, int64_t chunks)
      : ways_(ways), size_(size(args)), entering_(empty({args.sequences * ways * args.heads * chunks * size_}, math)),
        decays_(empty({args.sequences * ways * args.heads * chunks}, math)),
        carried_(empty({args.sequences * ways * args.heads * size_}, math)) {}

  // Those of some chunks, at most as many as there is memory for.
  SsdStates of(int first_direction, int64_t first, int64_t chunks) {
    return {first_direction, ways_, first, chunks, size_, entering_.mutable_data_ptr(), decays_.mutable_data_ptr(),
            carried_.mutable_data_ptr()};
  }
  // Whether they take so little memory that it does not matter.
  static bool few(const SsdArgs& args, DType math, int ways, int64_t chunks) {
    constexpr int64_t kBytes = 32 << 20;
    return args.sequences * ways * args.heads * chunks * size(args) * element_size(math) <= kBytes;
  }

 private:
  // Padded as any instruction set pads it, or more.
  static int64_t size(const SsdArgs& args) {
    const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
    return padded(args.headdim) * padded(args.dstate);
  }

  int ways_;
  int64_t size_;
  Tensor entering_, decays_, carried_;
};

}  // namespace linconv
