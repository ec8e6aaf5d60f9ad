// Vectors of the math type (float, double), one register of the instruction set wide, in GCC/Clang vector extensions:
// + - * / < and ?: work lane by lane, and a * b + c contracts to a fused multiply-add.
//
//   Vec<T>, kWidth<T>             the vector and its number of lanes
//   splat, load, store            unaligned; load(p, n) and store(p, v, n) touch n lanes only, the rest reads as 0
//   load_as<T>, store_as          the same from and to a storage type S: float, double, BFloat16, Float16
//   load_rows<T>, store_rows      rows of n elements, any strides, storage type by tag; load_row, store_row: one
//   add_product                   sum + a * b, where kPairProducts of pairs of bfloat16 numbers too
//   min, max, sum                 min and max keep a NaN in their second argument; sum is over lanes, in a fixed order
//   Wide<T>                       sums of vectors in double, lane by lane: for sums that cancel
//   exp, exp2, log1p_unit, softplus, sigmoid, silu     on vectors, and on single values
//
// Where AVX-512 intrinsics appear it is in their zero-masking form, all lanes on: GCC 12 takes the plain form for a read of
// an uninitialised register (its bug 105593), and makes the same instruction of both.
// Include from kernel.cpp only: everything here has internal linkage, once per instruction set.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#else
// GCC 12 calls its own AVX-512 intrinsics' undefined operands uninitialized.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtype.h"

#define LINCONV_INLINE inline __attribute__((always_inline))
#define LINCONV_NOINLINE __attribute__((noinline))

namespace linconv::LINCONV_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <int lanes>
struct VectorOf<BFloat16Pair, lanes> : VectorOf<uint32_t, lanes> {};
template <class T>
using Vec = typename VectorOf<T, kWidth<T>>::type;

template <class V>
struct LaneOf;
template <>
struct LaneOf<Vec<float>> {
  using type = float;
};
template <>
struct LaneOf<Vec<double>> {
  using type = double;
};
template <class V>
using Lane = typename LaneOf<V>::type;

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int mantissa = 23;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int mantissa = 52;
};
template <>
struct Bits<BFloat16Pair> {
  using type = uint32_t;
};
template <class T>
using BitVec = Vec<typename Bits<T>::type>;

template <class To, class From>
LINCONV_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
LINCONV_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this is a broadcast; 0 + x is not where x is -0
}

LINCONV_INLINE Vec<BFloat16Pair> splat(BFloat16Pair x) {
  return static_cast<uint32_t>(x) - Vec<BFloat16Pair>{};
}

template <class T>
LINCONV_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
LINCONV_INLINE Vec<T> load(const T* p, int n) {
  Vec<T> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class T>
LINCONV_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
LINCONV_INLINE void store(T* p, Vec<T> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

// ---- Storage types ----

template <class T, class S>
LINCONV_INLINE T to_math(S x) {
  if constexpr (__is_same(S, BFloat16)) {
    return static_cast<T>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
  } else if constexpr (__is_same(S, Float16)) {
#if defined(__x86_64__)
    return static_cast<T>(_cvtsh_ss(x.bits));
#else
    return static_cast<T>(bit_cast<__fp16>(x.bits));
#endif
  } else {
    return static_cast<T>(x);
  }
}

// To nearest, ties to even. A NaN stays one: its payload is cut, and its quiet bit set lest nothing be left of it.
template <class S, class T>
LINCONV_INLINE S to_storage(T x) {
  if constexpr (__is_same(S, BFloat16)) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded)};
  } else if constexpr (__is_same(S, Float16)) {
#if defined(__x86_64__)
    return {static_cast<uint16_t>(_cvtss_sh(static_cast<float>(x), _MM_FROUND_TO_NEAREST_INT))};
#else
    return {bit_cast<uint16_t>(static_cast<__fp16>(static_cast<float>(x)))};
#endif
  } else {
    return static_cast<S>(x);
  }
}

template <class T, class S>
LINCONV_INLINE Vec<T> load_as(const S* p) {
  if constexpr (__is_same(S, T)) {
    return load(p);
  } else if constexpr (__is_same(T, float) && __is_same(S, BFloat16)) {
    typename VectorOf<uint16_t, kWidth<float>>::type half;
    __builtin_memcpy(&half, p, sizeof(half));
    return bit_cast<Vec<float>>(__builtin_convertvector(half, Vec<uint32_t>) << 16);
#if defined(__AVX512F__)
  } else if constexpr (__is_same(T, float) && __is_same(S, Float16)) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  } else if constexpr (__is_same(T, float) && __is_same(S, Float16)) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  } else {
    Vec<T> v;
    for (int i = 0; i < kWidth<T>; ++i) v[i] = to_math<T>(p[i]);
    return v;
  }
}

// Each lane rounded as to_storage<BFloat16> does, in its low half.
LINCONV_INLINE Vec<uint32_t> bfloat16_bits(Vec<float> v) {
  const auto bits = bit_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

template <class S, class V>
LINCONV_INLINE void store_as(S* p, V v) {
  if constexpr (__is_same(S, Lane<V>)) {
    store(p, v);
  } else if constexpr (__is_same(V, Vec<float>) && __is_same(S, BFloat16)) {
    const auto half = __builtin_convertvector(bfloat16_bits(v), typename VectorOf<uint16_t, kWidth<float>>::type);
    __builtin_memcpy(p, &half, sizeof(half));
#if defined(__AVX512F__)
  } else if constexpr (__is_same(V, Vec<float>) && __is_same(S, Float16)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  } else if constexpr (__is_same(V, Vec<float>) && __is_same(S, Float16)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) p[i] = to_storage<S>(v[i]);
  }
}

// Rows of n elements of any storage type; strides are in elements. Never inlined: kernels have dozens, with code for each of
// four types.

// out[r * width + i] = p[r * row_stride + i * stride] for r < rows, i < n.
template <class T>
LINCONV_NOINLINE void load_rows(const void* p, DType dtype, int64_t row_stride, int64_t stride, int64_t rows, int64_t n, T* out,
                                int64_t width) {
  with_storage(dtype, [=](auto storage) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto* from = static_cast<const typename decltype(storage)::type*>(p) + r * row_stride;
      T* to = out + r * width;
      int64_t i = 0;
      if (stride == 1)
        for (; i + kWidth<T> <= n; i += kWidth<T>) store(to + i, load_as<T>(from + i));
      for (; i < n; ++i) to[i] = to_math<T>(from[i * stride]);
    }
  });
}
// p[r * row_stride + i * stride] = in[r * width + i].
template <class T>
LINCONV_NOINLINE void store_rows(void* p, DType dtype, int64_t row_stride, int64_t stride, int64_t rows, int64_t n, const T* in,
                                 int64_t width) {
  with_storage(dtype, [=](auto storage) {
    using S = typename decltype(storage)::type;
    for (int64_t r = 0; r < rows; ++r) {
      S* to = static_cast<S*>(p) + r * row_stride;
      const T* from = in + r * width;
      int64_t i = 0;
      if (stride == 1)
        for (; i + kWidth<T> <= n; i += kWidth<T>) store_as(to + i, load(from + i));
      for (; i < n; ++i) to[i * stride] = to_storage<S>(from[i]);
    }
  });
}

// The same of one row.
template <class T>
inline void load_row(const void* p, DType dtype, int64_t stride, int64_t n, T* out) {
  load_rows(p, dtype, 0, stride, 1, n, out, 0);
}
template <class T>
inline void store_row(void* p, DType dtype, int64_t stride, int64_t n, const T* in) {
  store_rows(p, dtype, 0, stride, 1, n, in, 0);
}

// ---- Products ----

// sum + a * b. Of pairs, sum + a's first * b's first + a's second * b's second, of single ones to which subnormal numbers
// are zeros.
LINCONV_INLINE Vec<float> add_product(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
LINCONV_INLINE Vec<double> add_product(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }
#if defined(__AVX512BF16__)
constexpr bool kPairProducts = true;
LINCONV_INLINE Vec<float> add_product(Vec<float> sum, Vec<BFloat16Pair> a, Vec<BFloat16Pair> b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#else
constexpr bool kPairProducts = false;
#endif

// ---- Functions ----

// Of x86's instructions for a < b ? a : b and a > b ? a : b GCC 12 makes use only now and then.
template <class V>
LINCONV_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (__is_same(V, Vec<float>)) return _mm512_maskz_min_ps(0xffff, a, b);
  else if constexpr (__is_same(V, Vec<double>)) return _mm512_maskz_min_pd(0xff, a, b);
#elif defined(__AVX2__)
  if constexpr (__is_same(V, Vec<float>)) return _mm256_min_ps(a, b);
  else if constexpr (__is_same(V, Vec<double>)) return _mm256_min_pd(a, b);
#endif
  return a < b ? a : b;
}
template <class V>
LINCONV_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (__is_same(V, Vec<float>)) return _mm512_maskz_max_ps(0xffff, a, b);
  else if constexpr (__is_same(V, Vec<double>)) return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX2__)
  if constexpr (__is_same(V, Vec<float>)) return _mm256_max_ps(a, b);
  else if constexpr (__is_same(V, Vec<double>)) return _mm256_max_pd(a, b);
#endif
  return a > b ? a : b;
}

// All lanes into one: the upper half onto the lower, and so on.
template <class T, int lanes, class F>
LINCONV_INLINE T fold_lanes(typename VectorOf<T, lanes>::type v, F f) {
  if constexpr (lanes == 2) {
    return f(v[0], v[1]);
  } else {
    typename VectorOf<T, lanes / 2>::type half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return fold_lanes<T, lanes / 2>(f(half[0], half[1]), f);
  }
}
template <class V>
LINCONV_INLINE Lane<V> sum(V v) {
  return fold_lanes<Lane<V>, sizeof(V) / sizeof(Lane<V>)>(v, [](auto a, auto b) { return a + b; });
}
template <class V>
LINCONV_INLINE Lane<V> greatest(V v) {
  return fold_lanes<Lane<V>, sizeof(V) / sizeof(Lane<V>)>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The lanes of a Vec<T> in double, as many vectors as they take.
template <class T>
struct Wide {
  static constexpr int parts = kWidth<T> / kWidth<double>;
  Vec<double> part[parts]{};

  LINCONV_INLINE void add(Vec<T> v) {
    if constexpr (parts == 1) {
      part[0] += v;
    } else {
      static_assert(parts == 2);
      typename VectorOf<T, kWidth<double>>::type half[2];
      __builtin_memcpy(half, &v, sizeof(v));
      for (int i = 0; i < 2; ++i) part[i] += __builtin_convertvector(half[i], Vec<double>);
    }
  }
  LINCONV_INLINE double sum() const {
    auto total = part[0];
    for (int i = 1; i < parts; ++i) total += part[i];
    return linconv::LINCONV_ISA::sum(total);
  }
};

// Horner's rule, lowest coefficient first.
template <class V, class T>
LINCONV_INLINE V polynomial(V, T c) {
  return V{} + c;
}
template <class V, class T, class... Rest>
LINCONV_INLINE V polynomial(V x, T c, Rest... rest) {
  return polynomial(x, rest...) * x + c;
}

// x * 2^n, n given as an integer and as a value; right to the last bit for subnormal results too.
template <class T>
LINCONV_INLINE Vec<T> scale_by_power(Vec<T> x, [[maybe_unused]] BitVec<T> n, [[maybe_unused]] Vec<T> value) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) return _mm512_maskz_scalef_ps(0xffff, x, value);
  else return _mm512_maskz_scalef_pd(0xff, x, value);
#else
  // In two steps: 2^n itself need not be a normal number. The bias keeps both halves' exponents positive.
  constexpr int mantissa = Bits<T>::mantissa;
  constexpr int bias = sizeof(T) == 4 ? 127 : 1023;
  const BitVec<T> biased = n + static_cast<typename Bits<T>::type>(2 * bias);
  const BitVec<T> low = biased >> 1, high = biased - low;
  return x * bit_cast<Vec<T>>(low << mantissa) * bit_cast<Vec<T>>(high << mantissa);
#endif
}

// e^x within 1 ulp. Overflow gives inf, underflow passes through the subnormals to 0, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r^2 q(r), q a minimax fit (relative error 3e-9 and 4e-18).
template <class T>
LINCONV_INLINE Vec<T> exp_lanes(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-104) : T(-746), highest = single ? T(89) : T(710);
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93147180369123816490e-01);  // few bits: n * ln2_high is exact
  constexpr T ln2_low = single ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  constexpr T to_integer = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa: rounds in the last bit
  x = max(splat(lowest), x);
  x = min(splat(highest), x);
  const Vec<T> shifted = x * T(1.44269504088896340736) + to_integer;
  const Vec<T> n = shifted - to_integer;
  const Vec<T> r = x - n * ln2_high - n * ln2_low;
  Vec<T> q;
  if constexpr (single)
    q = polynomial(r, 0.4999999343212929024f, 0.1666652039904253007f, 0.04166839078354791314f,
                   0.008368745108942590651f, 0.001381454017680130635f);
  else
    q = polynomial(r, 0.5000000000000010669, 0.1666666666666641151, 0.04166666666652972813, 0.008333333333494977261,
                   0.001388888894375998401, 0.00019841269505773807, 0.00002480149294961707077, 2.75575868038470707e-6,
                   2.763030625564785736e-7, 2.500001885308334195e-8);
  const BitVec<T> integer = bit_cast<BitVec<T>>(shifted) - bit_cast<BitVec<T>>(splat(to_integer));
  return scale_by_power<T>(r * r * q + r + T(1), integer, n);
}

// 2^x within 1.5 ulp, in fewer operations than e^x; overflow, underflow and NaN as there, but for x = inf: NaN in AVX-512.
// x = n + r with |r| <= 1/2; 2^r = 1 + r q(r), so that of a small x the difference to 1 is as exact as x. q is near the
// minimax polynomial (8e-9 and 1.2e-17 off).
template <class T>
LINCONV_INLINE Vec<T> exp2_lanes(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  x = max(splat(single ? T(-151) : T(-1076)), x);
#if defined(__AVX512F__)
  Vec<T> n;
  if constexpr (single) n = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  else n = _mm512_maskz_roundscale_pd(0xff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const BitVec<T> integer{};  // scale_by_power goes by the value
#else
  constexpr T to_integer = single ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^mantissa: rounds in the last bit
  x = min(splat(single ? T(129) : T(1025)), x);
  const Vec<T> shifted = x + to_integer, n = shifted - to_integer;
  const BitVec<T> integer = bit_cast<BitVec<T>>(shifted) - bit_cast<BitVec<T>>(splat(to_integer));
#endif
  const Vec<T> r = x - n;
  Vec<T> q;
  if constexpr (single)
    q = polynomial(r, 0.693147188f, 0.2402265076f, 0.05550357114f, 0.009618082557f, 0.001339086336f, 0.0001545316295f);
  else
    q = polynomial(r, 0.69314718055994530909, 0.24022650695910098223, 0.055504108664821659773, 0.0096181291076068869668,
                   0.0013333558146395995211, 0.00015403530441738292431, 0.000015252733853289476584, 1.3215442586728663638e-6,
                   1.0178051724308302769e-7, 7.0725861612307770655e-9, 4.4566760308267050217e-10);
  return scale_by_power<T>(r * q + T(1), integer, n);
}

// log(1 + u) for 0 <= u <= 1 within 2 ulp: 2 atanh(s), s = u / (2 + u) <= 1/3, as 2 s + s^3 g(s^2), g a minimax fit.
template <class T>
LINCONV_INLINE Vec<T> log1p_unit_lanes(Vec<T> u) {
  const Vec<T> s = u / (u + T(2));
  const Vec<T> z = s * s;
  Vec<T> g;
  if constexpr (sizeof(T) == 4)
    g = polynomial(z, 0.666666756257592698f, 0.3999887735717179721f, 0.2861689677388833482f, 0.2142751373333425048f,
                   0.2430152302503284985f);
  else
    g = polynomial(z, 0.6666666666666667833, 0.3999999999999397244, 0.285714285725108703, 0.2222222212540326321,
                   0.1818182320600215857, 0.1538445184512645555, 0.1333680738654860779, 0.1171593263158802143,
                   0.109726950724465099, 0.0699373372816486542, 0.1646851860808153674);
  return s * z * g + T(2) * s;
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), within 3 ulp: nothing overflows, and neither end loses accuracy.
template <class T>
LINCONV_INLINE Vec<T> softplus_lanes(Vec<T> x) {
  const Vec<T> magnitude = x < T(0) ? -x : x;
  return (x < T(0) ? splat(T(0)) : x) + log1p_unit_lanes<T>(exp_lanes<T>(-magnitude));
}

// 1 / (1 + e^-x), within 3 ulp, as silu is; also the derivative of softplus.
template <class T>
LINCONV_INLINE Vec<T> sigmoid_lanes(Vec<T> x) {
  return T(1) / (exp_lanes<T>(-x) + T(1));
}

// x * sigmoid(x); its derivative is s + x s (1 - s) with s = sigmoid(x).
template <class T>
LINCONV_INLINE Vec<T> silu_lanes(Vec<T> x) {
  return x / (exp_lanes<T>(-x) + T(1));
}

#define LINCONV_FUNCTION(name)                                                           \
  LINCONV_INLINE Vec<float> name(Vec<float> x) { return name##_lanes<float>(x); }        \
  LINCONV_INLINE Vec<double> name(Vec<double> x) { return name##_lanes<double>(x); }     \
  LINCONV_INLINE float name(float x) { return name##_lanes<float>(splat(x))[0]; }        \
  LINCONV_INLINE double name(double x) { return name##_lanes<double>(splat(x))[0]; }
LINCONV_FUNCTION(exp)
LINCONV_FUNCTION(exp2)
LINCONV_FUNCTION(log1p_unit)
LINCONV_FUNCTION(softplus)
LINCONV_FUNCTION(sigmoid)
LINCONV_FUNCTION(silu)
#undef LINCONV_FUNCTION

}  // namespace
}  // namespace linconv::LINCONV_ISA
