#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace linconv {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::v3: return "v3";
    case Isa::v4: return "v4";
    case Isa::v4_bf16: return "v4_bf16";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

#if defined(__x86_64__)
// What the processor has, by its own words: __builtin_cpu_supports knows other features from compiler to compiler.
struct Features {
  uint32_t leaf1_c = 0, leaf7_b = 0, leaf7_1_a = 0, extended_c = 0;
  uint64_t kept = 0;  // registers that the operating system keeps for each thread

  Features() {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_c = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_b = b;
    if (leaf7_b && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_a = a;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended_c = c;
    constexpr uint32_t xgetbv = 1u << 27;
    if (leaf1_c & xgetbv) {
      __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
      kept = uint64_t(d) << 32 | a;
    }
  }
};

template <class... Bit>
static bool has(uint64_t bits, Bit... bit) {
  return ((bits >> bit & 1) && ...);
}
#endif

// Best last.
IsaList isas() {
#if defined(__x86_64__)
  static const Features cpu;
  static const bool has_v3 = has(cpu.leaf1_c, 12, 22, 28, 29) &&  // FMA, MOVBE, AVX, F16C
                             has(cpu.leaf7_b, 3, 5, 8) &&         // BMI1, AVX2, BMI2
                             has(cpu.extended_c, 5) &&            // LZCNT
                             has(cpu.kept, 1, 2);                 // XMM, YMM
  static const bool has_v4 = has_v3 && has(cpu.leaf7_b, 16, 17, 28, 30, 31) &&  // AVX-512 F, DQ, CD, BW, VL
                             has(cpu.kept, 5, 6, 7);                            // masks, ZMM
  static const bool has_v4_bf16 = has_v4 && has(cpu.leaf7_1_a, 5);
  static const IsaSupport list[] = {{Isa::v3, has_v3}, {Isa::v4, has_v4}, {Isa::v4_bf16, has_v4_bf16}};
  return {list, 3};
#else
  static const IsaSupport list[] = {{Isa::neon, true}};
  return {list, 1};
#endif
}

static Isa choose() {
  const IsaList list = isas();
  const char* wanted = std::getenv("LINCONV_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (int i = list.count - 1; i >= 0; --i)
      if (list.items[i].supported) return list.items[i].isa;
    throw std::runtime_error("this CPU lacks AVX2 and FMA (x86-64-v3), the least that the library was built for");
  }
  std::string names;
  for (int i = 0; i < list.count; ++i) {
    const auto& [isa, supported] = list.items[i];
    if (isa_name(isa) == std::string(wanted)) {
      if (supported) return isa;
      throw std::runtime_error("LINCONV_CPU_ISA='" + std::string(wanted) + "': this CPU does not have it");
    }
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("LINCONV_CPU_ISA='" + std::string(wanted) + "' is unknown: wants one of " + names +
                           ", or unset for the best this CPU has");
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace linconv
