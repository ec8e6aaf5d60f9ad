// Which instruction set's kernels run on this machine.
//
// Every csrc/<op>/kernel.cpp is compiled once per instruction set, each time inside `namespace linconv::LINCONV_ISA`: v3 and
// v4 are x86-64-v3 and x86-64-v4, v4_bf16 is v4 with AVX512-BF16, neon is the aarch64 baseline. Its kernel.h declares each
// entry point with
//
//     LINCONV_KERNEL(void, short_conv_forward, const ShortConvArgs& args, int64_t begin, int64_t end);
//
// inside `namespace linconv`, and cpu.cpp calls the one for this machine:
//
//     LINCONV_PICK(short_conv_forward)(args, begin, end);
//
// This header may be included by kernel.cpp: nothing but declarations is visible there.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define LINCONV_KERNEL(result, name, ...) \
  namespace v3 {                          \
  result name(__VA_ARGS__);               \
  }                                       \
  namespace v4 {                          \
  result name(__VA_ARGS__);               \
  }                                       \
  namespace v4_bf16 {                     \
  result name(__VA_ARGS__);               \
  }                                       \
  static_assert(true, "")
#define LINCONV_PICK(name)                                                     \
  (::linconv::isa() == ::linconv::Isa::v4_bf16 ? ::linconv::v4_bf16::name      \
   : ::linconv::isa() == ::linconv::Isa::v4    ? ::linconv::v4::name           \
                                               : ::linconv::v3::name)
#elif defined(__aarch64__)
#define LINCONV_KERNEL(result, name, ...) \
  namespace neon {                        \
  result name(__VA_ARGS__);               \
  }                                       \
  static_assert(true, "")
#define LINCONV_PICK(name) (::linconv::isa(), ::linconv::neon::name)
#else
#error "linconv's CPU kernels want x86-64 or aarch64"
#endif

namespace linconv {

enum class Isa : int32_t { v3, v4, v4_bf16, neon };

// The instruction set in use: the best one this CPU has, or the one LINCONV_CPU_ISA names. Read once. Throws
// std::runtime_error where the variable names none of them, or one this CPU lacks, or where the CPU has none at all.
Isa isa();

// "v3", "v4", "v4_bf16" or "neon".
const char* isa_name(Isa isa);

// The instruction sets this library was built for, and whether this CPU has them.
struct IsaSupport {
  Isa isa;
  bool supported;
};
struct IsaList {
  const IsaSupport* items;
  int count;
};
IsaList isas();

}  // namespace linconv
