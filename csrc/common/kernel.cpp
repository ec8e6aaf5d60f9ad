#include "common/parts.h"
#include "common/vec.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
void sum(const PartsArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t block = 512;
  alignas(64) T total[block];
  for (; begin < end; begin += block) {
    const int64_t n = end - begin < block ? end - begin : block;
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    for (int64_t a = 0; a < args.outer; ++a)
      for (int64_t b = 0; b < args.inner; ++b) {
        const T* part = static_cast<const T*>(args.parts) + a * args.outer_stride + b * args.inner_stride + begin;
        for (int64_t i = 0; i < n; ++i) total[i] += part[i];
      }
    store_row(offset(args.out, args.dtype, begin), args.dtype, 1, n, total);
  }
}

}  // namespace

void sum_parts(const PartsArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? sum<double>(args, begin, end) : sum<float>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
