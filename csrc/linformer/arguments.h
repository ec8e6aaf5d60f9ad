// What cpu.cpp and cuda.cu check of their arguments, and how both lay out what is shaped as frames.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/tensor.h"
#include "linformer/dropout.h"

namespace linconv {

constexpr int64_t kMostLinformerRanks = 512, kMostLinformerColumns = 256;

// (batch, heads, L, headdim), in memory (batch, L, heads, headdim): a frame's heads lie side by side, as one projection of
// them reads them.
inline Tensor empty_frames(const View<4>& like) {
  Tensor out = empty({like.size[0], like.size[2], like.size[1], like.size[3]}, like.dtype);
  return torch::stable::transpose(out, 1, 2);
}

template <class Args>
void require_rank_and_columns(const Args& a) {
  require(a.rank >= 1 && a.rank <= kMostLinformerRanks, "r is ", a.rank, ", wanted 1 to ", kMostLinformerRanks);
  require(a.headdim >= 1 && a.headdim <= kMostLinformerColumns, "headdim is ", a.headdim, ", wanted 1 to ",
          kMostLinformerColumns);
}

template <class Args>
Args read_project_arguments(const Tensor& x, const Tensor& proj, bool normalize) {
  Args a{};
  a.x = view<4>(x, "x");
  a.proj = view<3>(proj, "proj");
  a.batch = a.x.size[0], a.heads = a.x.size[1], a.frames = a.x.size[2], a.headdim = a.x.size[3];
  a.rank = a.proj.size[2];
  a.normalize = normalize;
  require_rank_and_columns(a);
  require(a.proj.size[0] == 1 || a.proj.size[0] == a.heads, "proj has ", a.proj.size[0], " heads, wanted 1 or ", a.heads);
  require(a.frames <= a.proj.size[1], "x has ", a.frames, " frames, wanted at most ", a.proj.size[1], ", those of proj");
  require(math_type(a.x.dtype) == math_type(a.proj.dtype), "x and proj: wanted both or none in Double");
  return a;
}

template <class Args>
void add_gradient(Args& a, const Tensor& grad, const int64_t (&sizes)[4], const View<4>& like, const char* name) {
  a.grad = view<4>(grad, "grad");
  require_sizes(a.grad, sizes, "grad");
  require(math_type(a.grad.dtype) == math_type(like.dtype), "grad and ", name, ": wanted both or none in Double");
}

// All but the seed, which only kernels can read where it is on a GPU.
template <class Args>
Args read_attend_arguments(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                           const std::optional<Tensor>& seed) {
  Args a{};
  a.q = view<4>(q, "q");
  a.k = view<4>(k, "k");
  a.v = view<4>(v, "v");
  a.batch = a.q.size[0], a.heads = a.q.size[1], a.frames = a.q.size[2], a.headdim = a.q.size[3];
  a.rank = a.k.size[2];
  a.scale = scale;
  require_rank_and_columns(a);
  require_sizes(a.k, {a.batch, a.heads, a.rank, a.headdim}, "k");
  require_sizes(a.v, {a.batch, a.heads, a.rank, a.headdim}, "v");
  const DType math = math_type(a.q.dtype);
  require(math_type(a.k.dtype) == math && math_type(a.v.dtype) == math, "q, k and v: wanted all or none in Double");
  require(dropout_p >= 0 && dropout_p < 1, "dropout_p is ", dropout_p, ", wanted 0 <= dropout_p < 1");
  if (dropout_p == 0) return a;
  require(seed.has_value(), "seed is absent, wanted one for dropout_p above 0");
  require_strided(*seed, 0, "seed");
  require(seed->scalar_type() == ScalarType::Long, "seed has another dtype than Long");
  a.dropout.threshold = static_cast<uint32_t>(std::min(std::round(dropout_p * 4294967296.0), 4294967295.0));
  a.dropout.keep_scale = 1 / (1 - dropout_p);
  return a;
}

}  // namespace linconv
