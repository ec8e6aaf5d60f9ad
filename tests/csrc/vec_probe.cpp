// csrc/common/vec.h behind C functions on arrays, for test_vec.py.
#include "common/vec.h"

using namespace linconv;
using namespace linconv::LINCONV_ISA;

template <class T, class F>
static void map(const T* in, T* out, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) store(out + i, f(load(in + i)));
  for (; i < n; ++i) out[i] = f(in[i]);  // the single-value overload
}

#define PROBE(name)                                                                                                  \
  extern "C" void name##_float(const float* in, float* out, int64_t n) {                                             \
    map(in, out, n, [](auto x) __attribute__((always_inline)) { return LINCONV_ISA::name(x); });                     \
  }                                                                                                                  \
  extern "C" void name##_double(const double* in, double* out, int64_t n) {                                          \
    map(in, out, n, [](auto x) __attribute__((always_inline)) { return LINCONV_ISA::name(x); });                     \
  }
PROBE(exp)
PROBE(exp2)
PROBE(log1p_unit)
PROBE(softplus)
PROBE(sigmoid)
PROBE(silu)

extern "C" int width_float() { return kWidth<float>; }
extern "C" float sum_float(const float* in) { return sum(load(in)); }
extern "C" double sum_double(const double* in) { return sum(load(in)); }

// in and out are rows of storage types given by tag, strides in elements; `row` is scratch of the math type.
extern "C" void convert_float(const void* in, int32_t from, int64_t in_stride, void* out, int32_t to,
                              int64_t out_stride, int64_t n, float* row) {
  load_row(in, static_cast<DType>(from), in_stride, n, row);
  store_row(out, static_cast<DType>(to), out_stride, n, row);
}
extern "C" void convert_double(const void* in, int32_t from, int64_t in_stride, void* out, int32_t to,
                               int64_t out_stride, int64_t n, double* row) {
  load_row(in, static_cast<DType>(from), in_stride, n, row);
  store_row(out, static_cast<DType>(to), out_stride, n, row);
}
