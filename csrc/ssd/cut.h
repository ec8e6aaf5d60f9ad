// How the work of a scan is cut among threads. For cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/tasks.h"
#include "common/tensor.h"
#include "ssd/kernel.h"

namespace linconv {

// Expected times, as parts of what one head of a chunk takes. A task pays once for the products of B and C that its heads
// share. Where tasks take one chunk, it is read twice and its states are written and read: so much more, for each head; and
// threads wait for each other after every stage.
constexpr double kSharedCost = 0.3;
constexpr double kByChunks = 0.25;
constexpr double kStages = 0.3;
constexpr int kMinColumns = 16;
constexpr int64_t kMostStates = 4 << 20;  // bytes of a task's states, which are to stay in a cache

// The chunks of a batch in their places; or pieces of its frames, as long as chunks, padding included.
class Chunks {
 public:
  explicit Chunks(const SsdArgs& args, bool padding = false) : starts_{0} {
    for (int64_t s = 0; s < args.sequences; ++s) {
      const int64_t chunks = args.chunks_of(args.length(s) + (padding ? args.padding(s) : 0));
      starts_.push_back(starts_.back() + std::max<int64_t>(chunks, 1));
    }
  }
  int64_t count() const { return starts_.back(); }
  SsdRange range(int first_direction, int ways, int64_t first, int64_t count) const {
    return {starts_.data(), static_cast<int64_t>(starts_.size()) - 1, first, count, first_direction, ways};
  }
  SsdRange all(int first_direction, int ways) const { return range(first_direction, ways, 0, count()); }

 private:
  std::vector<int64_t> starts_;
};

// How many chunks go through the stages before the next ones, so that every thread has some and their states stay in its
// cache.
inline int64_t chunks_at_once(const SsdArgs& args, int ways, int64_t chunks) {
  constexpr int64_t kTasksOfThread = 4;
  const int64_t tasks = kTasksOfThread * torch::stable::get_num_threads();
  return std::min(chunks, (tasks + ways * args.blocks() - 1) / (ways * args.blocks()));
}

inline double rounds(int64_t tasks) {
  return std::ceil(static_cast<double>(tasks) / static_cast<double>(torch::stable::get_num_threads()));
}

inline double heads_of_task(const SsdArgs& args) {
  return args.head_block * static_cast<double>(args.column_block) / args.headdim;
}

// Of tasks that take all frames of a sequence: the longest one, or as many as a thread has.
inline double time_of_sequences(const SsdArgs& args, int64_t chunks) {
  const double mean = static_cast<double>(chunks) / static_cast<double>(std::max<int64_t>(args.sequences, 1));
  const double longest = static_cast<double>(args.chunks_of(args.longest()));
  const int directions = args.summed ? args.directions : 1;
  return directions * std::max(longest, mean * rounds(args.tasks())) * (kSharedCost + heads_of_task(args));
}

// Of tasks that take one chunk.
inline double time_of_chunks(const SsdArgs& args, int ways, int64_t chunks) {
  const int64_t at_once = chunks_at_once(args, ways, chunks), tasks = ways * args.blocks(), ranges = chunks / at_once;
  const double all = static_cast<double>(ranges) * rounds(at_once * tasks) + rounds(chunks % at_once * tasks);
  return args.directions / ways * (all * (kSharedCost + (1 + kByChunks) * heads_of_task(args)) +
                                   static_cast<double>(ranges) * kStages);
}

inline bool may_cut_time(const SsdArgs& args) {
  return torch::stable::get_num_threads() > 1 && args.heads > 0 && args.longest() > kSsdChunk;
}

// Chooses the cut with the least expected time. Results do not depend on it: every head, column and chunk is computed alike.
// Returns whether tasks take one chunk.
inline bool cut_forward(SsdArgs& args, int ways, int64_t chunks, int64_t state_bytes) {
  double best = std::numeric_limits<double>::infinity();
  int best_heads = 1, best_columns = args.headdim;
  bool best_by_chunks = false;
  const auto consider = [&](double time, bool by_chunks) {
    if (time < best)
      best = time, best_heads = args.head_block, best_columns = args.column_block, best_by_chunks = by_chunks;
  };
  const int most_heads = static_cast<int>(std::clamp<int64_t>(kMostStates / state_bytes, 1, std::max(args.group_heads(), 1)));
  for (int columns = args.headdim; columns >= kMinColumns || columns == args.headdim; columns = (columns + 1) / 2) {
    args.column_block = columns;
    for (args.head_block = most_heads; args.head_block >= 1; --args.head_block) {
      consider(time_of_sequences(args, chunks), false);
      if (columns == args.headdim && may_cut_time(args)) consider(time_of_chunks(args, ways, chunks), true);
    }
    if (columns <= kMinColumns) break;
  }
  args.head_block = best_heads;
  args.column_block = best_columns;
  return best_by_chunks;
}

// Backward's heads of a task are given. Returns whether tasks take one chunk.
inline bool cut_backward(const SsdArgs& args, int ways, int64_t chunks) {
  return may_cut_time(args) && time_of_chunks(args, ways, chunks) < time_of_sequences(args, chunks);
}

// Memory of the states of at most so many chunks, of as many directions as are computed at once.
class StatesInMemory {
 public:
  StatesInMemory(const SsdArgs& args, DType math, int ways, int64_t chunks)
      : heads_(args.heads), size_(size(args)), entering_(empty({chunks * ways * args.heads * size_}, math)),
        decays_(empty({chunks * ways * args.heads}, math)),
        carried_{empty({ways * args.heads * size_}, math), empty({ways * args.heads * size_}, math)} {}

  // Those of a range of chunks. The last one's are overwritten, but for what it carries on to this one.
  SsdStates of(const SsdRange& range) {
    std::swap(carried_[0], carried_[1]);
    return {range, heads_, size_, entering_.mutable_data_ptr(), decays_.mutable_data_ptr(), carried_[0].data_ptr(),
            carried_[1].mutable_data_ptr()};
  }
  // Of one head; padded as any instruction set pads it, or more.
  static int64_t size(const SsdArgs& args) {
    const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
    return padded(args.headdim) * padded(args.dstate);
  }

 private:
  int heads_;
  int64_t size_;
  Tensor entering_, decays_, carried_[2];
};

// How many directions backward computes at once: those whose states take so little memory that it does not matter.
inline int backward_ways(const SsdArgs& args, DType math, int64_t chunks) {
  constexpr int64_t kBytes = 32 << 20;
  if (args.summed) return 1;
  const int64_t states = chunks * args.directions * args.heads * StatesInMemory::size(args);
  return states * element_size(math) <= kBytes ? args.directions : 1;
}

}  // namespace linconv
