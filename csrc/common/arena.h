// Scratch memory of one task.
#pragma once

#include "common/pages.h"
#include "common/vec.h"

namespace linconv {

[[noreturn]] void out_of_memory(size_t bytes);  // throws

}  // namespace linconv

namespace linconv::LINCONV_ISA {
namespace {

// Cuts aligned arrays off one allocation.
class Arena {
 public:
  // Zeroed, so that what pads a tile is finite; a large block's pages cost nothing until they are written.
  explicit Arena(size_t bytes) : base_(static_cast<char*>(__builtin_calloc(bytes + kAlign, 1))) {
    if (base_ == nullptr) out_of_memory(bytes);
    prefer_large_pages(base_, bytes + kAlign);
    next_ = base_ + (kAlign - reinterpret_cast<uintptr_t>(base_) % kAlign);
  }
  ~Arena() { __builtin_free(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class T>
  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(n);
    return taken;
  }
  template <class T>
  static constexpr size_t bytes(int64_t n) {
    return (n * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr size_t kAlign = 64;
  char *base_, *next_;
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
