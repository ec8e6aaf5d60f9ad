#include "cuda_on_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cuda_on_host {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kSlot = 32, kTables = 2;
enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Thread thread;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  State state;
  unsigned exchanges;
  std::vector<Copy> open;                 // not yet committed
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<char[]>> tables;  // for each warp, kTables of 32 slots
  Fiber* running = nullptr;
  jmp_buf scheduler;
  ucontext_t main;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr failure;
};
Block block;

bool backward() {
  const char* order = std::getenv("LINCONV_HOST_ORDER");
  return order != nullptr && std::string(order) == "backward";
}

// A fiber is left and entered again by longjmp: swapcontext makes a system call each time.
void leave(State state) {
  Fiber* fiber = block.running;
  fiber->state = state;
  if (_setjmp(fiber->resume) == 0) _longjmp(block.scheduler, 1);
}

// One thread after another: that of the next block is entered where this one left.
void body() {
  for (;;) {
    try {
      (*block.kernel)();
    } catch (...) {
      block.failure = std::current_exception();
    }
    leave(State::kDone);
  }
}

void enter(Fiber& fiber) {
  block.running = &fiber;
  fiber.state = State::kReady;
  if (_setjmp(block.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    setcontext(&fiber.context);
  }
  if (block.failure) std::rethrow_exception(std::exchange(block.failure, nullptr));
}

// Runs a warp up to the block's next barrier or to its end; returns which.
State run_warp(int first, int lanes, bool reversed) {
  for (;;) {
    for (int i = 0; i < lanes; ++i) enter(*block.fibers[first + (reversed ? lanes - 1 - i : i)]);
    const State state = block.fibers[first]->state;
    for (int i = 1; i < lanes; ++i)
      if (block.fibers[first + i]->state != state)
        throw std::runtime_error("threads of warp " + std::to_string(first / 32) + " part at a barrier or an exchange");
    if (state != State::kAtWarp) return state;
  }
}

void run_block(int threads, bool reversed) {
  for (bool done = false; !done;) {
    const int warps = (threads + 31) / 32;
    int finished = 0;
    for (int i = 0; i < warps; ++i) {
      const int warp = reversed ? warps - 1 - i : i, lanes = std::min(32, threads - warp * 32);
      finished += run_warp(warp * 32, lanes, reversed) == State::kDone;
    }
    if (finished != 0 && finished != warps) throw std::runtime_error("a barrier that some warps of the block do not reach");
    done = finished == warps;
  }
}

}  // namespace

Thread& current() { return block.running->thread; }

void block_barrier() { leave(State::kAtBlock); }

const char* exchange(const void* value, int bytes) {
  Fiber* fiber = block.running;
  const unsigned lane = fiber->thread.thread.x % 32;
  char* table = block.tables[fiber->thread.thread.x / 32].get() + fiber->exchanges++ % kTables * 32 * kSlot;
  std::memcpy(table + lane * kSlot, value, bytes);
  leave(State::kAtWarp);
  return table;
}

void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads) + " threads, at most 1024 can be launched");
  if (shared_bytes > 227 << 10) throw std::runtime_error("more shared memory than a block can have");
  const bool reversed = backward();
  std::vector<uint4> shared((shared_bytes + sizeof(uint4) - 1) / sizeof(uint4));
  while (block.fibers.size() < static_cast<size_t>(threads)) block.fibers.push_back(std::make_unique<Fiber>());
  while (block.tables.size() < static_cast<size_t>(threads + 31) / 32) block.tables.emplace_back(new char[kTables * 32 * kSlot]);
  block.kernel = &kernel;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t index = reversed ? blocks - 1 - i : i;
    const dim3 at(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    std::fill(shared.begin(), shared.end(), uint4{~0u, ~0u, ~0u, ~0u});
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *block.fibers[t];
      fiber.thread = {dim3(t, 0, 0), at, grid, dim3(threads), shared.data()};
      fiber.started = fiber.started && fiber.state == State::kDone;  // a kernel that failed is left where it stands
      fiber.exchanges = 0;
      fiber.open.clear();
      fiber.groups.clear();
    }
    run_block(threads, reversed);
    for (int t = 0; t < threads; ++t)
      if (!block.fibers[t]->open.empty() || !block.fibers[t]->groups.empty())
        throw std::runtime_error("a thread ends before its copies are waited for");
  }
}

// Fragments as the PTX manual lays them out: lane = 4 * group + part holds, of A (16 x 16), rows group and group + 8,
// columns 2 part, 2 part + 1 and those 8 later; of B (16 x 8), rows 2 part, 2 part + 1 and those 8 later, column group;
// of D (16 x 8), rows group and group + 8, columns 2 part and 2 part + 1.
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  using namespace linconv;
  const auto value = [&](uint32_t pair, int half) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
    return bfloat16 ? to_math<float>(BFloat16{bits}) : to_math<float>(Float16{bits});
  };
  uint32_t mine[6];
  std::memcpy(mine, a, sizeof(a));
  std::memcpy(mine + 4, b, sizeof(b));
  const char* table = exchange(mine, sizeof(mine));
  const auto word = [&](int lane, int i) {
    uint32_t out;
    std::memcpy(&out, table + lane * kSlot + i * 4, 4);
    return out;
  };
  const int lane = static_cast<int>(current().thread.x % 32), group = lane / 4, part = lane % 4;
  float row[2][16], column[2][16];
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2;
    for (int r = 0; r < 2; ++r) row[r][k] = value(word(group * 4 + holder, r + 2 * (k / 8)), k % 2);
    for (int c = 0; c < 2; ++c) column[c][k] = value(word((2 * part + c) * 4 + holder, 4 + k / 8), k % 2);
  }
  for (int r = 0; r < 2; ++r)
    for (int c = 0; c < 2; ++c) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[r][k] * column[c][k];
      d[2 * r + c] += sum;
    }
}

// Matrix i's rows are at lanes 8 i to 8 i + 7; lane 4 r + c gets its elements (r, 2 c), (r, 2 c + 1), of the transpose if so.
void ldmatrix(uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) __builtin_trap();
  const char* table = exchange(&row, sizeof(row));
  const int lane = static_cast<int>(current().thread.x % 32), r = lane / 4, c = lane % 4;
  const auto element = [&](int i, int row_, int column) {
    const uint16_t* from;
    std::memcpy(&from, table + (8 * i + row_) * kSlot, sizeof(from));
    return static_cast<uint32_t>(from[column]);
  };
  for (int i = 0; i < 4; ++i)
    out[i] = transposed ? element(i, 2 * c, r) | element(i, 2 * c + 1, r) << 16 : element(i, r, 2 * c) | element(i, r, 2 * c + 1) << 16;
}

void copy_later(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) __builtin_trap();
  block.running->open.push_back({to, from, bytes});
}

void commit_copies() {
  Fiber* fiber = block.running;
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}

void wait_copies(int groups_left) {
  Fiber* fiber = block.running;
  for (; static_cast<int>(fiber->groups.size()) > groups_left; fiber->groups.pop_front())
    for (const Copy& copy : fiber->groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

}  // namespace cuda_on_host
