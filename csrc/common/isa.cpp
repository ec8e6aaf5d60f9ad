#include "common/isa.h"

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

// Best last.
IsaList isas() {
#if defined(__x86_64__)
  static const auto has_v3 = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") &&
           __builtin_cpu_supports("movbe");
  }();
  static const auto has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  static const auto has_v4_bf16 = has_v4 && __builtin_cpu_supports("avx512bf16");
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
