#include <algorithm>
#include <tuple>

#include "linformer/arguments.h"
#include "linformer/kernel.h"

namespace linconv {
namespace {

using Optional = std::optional<Tensor>;

int64_t most_splits(const std::vector<Span>& spans) {
  int64_t most = 1;
  for (const Span& span : spans) most = std::max(most, linformer_splits(span.end));
  return most;
}

// `spans` must outlive the result.
LinformerProjectArgs project_arguments(const Tensor& x, const Tensor& proj, bool normalize, const Optional& seq_lens,
                                       std::vector<Span>& spans) {
  auto a = read_project_arguments<LinformerProjectArgs>(x, proj, normalize);
  spans = sequence_spans(seq_lens, std::nullopt, a.batch, a.frames);
  a.spans = spans.data();
  a.splits = most_splits(spans);
  return a;
}

Tensor project(Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  std::vector<Span> spans;
  LinformerProjectArgs a = project_arguments(x, proj, normalize, seq_lens, spans);
  const DType math = math_type(a.x.dtype);
  const bool fp64 = math == DType::kFloat64;
  Tensor out = empty({a.batch, a.heads, a.rank, a.headdim}, math);
  a.out = view<4>(out, "out");
  std::optional<Tensor> parts;
  if (a.splits > 1) {
    parts = empty({a.batch, a.heads, a.splits, a.rank, a.headdim}, math);
    a.parts = parts->data_ptr();
  }
  torch::stable::parallel_for(0, a.batch * a.splits * a.heads, 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_project)(a, fp64, begin, end);
  });
  if (a.splits > 1) {
    const LinformerSumArgs sum{a.parts, a.out, a.spans, a.heads, a.splits, a.rank, a.headdim, normalize, false};
    torch::stable::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
      LINCONV_PICK(linformer_sum)(sum, fp64, begin, end);
    });
  }
  return out;
}

std::tuple<Tensor, Tensor> project_backward(Tensor grad, Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  std::vector<Span> spans;
  LinformerProjectArgs a = project_arguments(x, proj, normalize, seq_lens, spans);
  const DType math = math_type(a.x.dtype);
  const bool fp64 = math == DType::kFloat64;
  add_gradient(a, grad, {a.batch, a.heads, a.rank, a.headdim}, a.x, "x");
  Tensor dx = empty_frames(a.x), dproj = empty({a.proj.size[0], a.proj.size[1], a.rank}, a.proj.dtype);
  Tensor packed = empty({a.batch, a.heads, linformer_packed(a.rank, a.headdim)}, math);
  a.dx = view<4>(dx, "dx");
  a.dproj = view<3>(dproj, "dproj");
  a.packed = packed.data_ptr();
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  torch::stable::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_pack)(a, fp64, begin, end);
  });
  torch::stable::parallel_for(0, a.batch * blocks(a.frames, kLinformerBlock), 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_unproject)(a, fp64, begin, end);
  });
  const int64_t tasks = a.proj.size[0] * blocks(a.proj.size[1], kLinformerBlock) * blocks(a.rank, kLinformerRanks);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_project_weights)(a, fp64, begin, end);
  });
  return {dx, dproj};
}

LinformerAttendArgs attend_arguments(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                                     const Optional& seed, const Optional& seq_lens, std::vector<Span>& spans) {
  auto a = read_attend_arguments<LinformerAttendArgs>(q, k, v, scale, dropout_p, seed);
  if (dropout_p > 0) a.dropout.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  spans = sequence_spans(seq_lens, std::nullopt, a.batch, a.frames);
  a.spans = spans.data();
  return a;
}

Tensor attend(Tensor q, Tensor k, Tensor v, double scale, double dropout_p, Optional seed, Optional seq_lens) {
  std::vector<Span> spans;
  LinformerAttendArgs a = attend_arguments(q, k, v, scale, dropout_p, seed, seq_lens, spans);
  Tensor out = empty_frames(a.q);
  a.out = view<4>(out, "out");
  const bool fp64 = a.q.dtype == DType::kFloat64;
  torch::stable::parallel_for(0, a.batch * a.heads * a.query_blocks(), 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_attend)(a, fp64, begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, double scale,
                                                   double dropout_p, Optional seed, Optional seq_lens) {
  std::vector<Span> spans;
  LinformerAttendArgs a = attend_arguments(q, k, v, scale, dropout_p, seed, seq_lens, spans);
  const DType math = math_type(a.q.dtype);
  const bool fp64 = math == DType::kFloat64;
  add_gradient(a, grad, {a.batch, a.heads, a.frames, a.headdim}, a.q, "q");
  a.splits = most_splits(spans);
  Tensor dq = empty_frames(a.q), dk = empty_as(k, a.k.dtype), dv = empty_as(v, a.v.dtype);
  Tensor parts = empty({2, a.batch, a.heads, a.splits, a.rank, a.headdim}, math);
  a.dq = view<4>(dq, "dq");
  a.dk = view<4>(dk, "dk");
  a.dv = view<4>(dv, "dv");
  a.dk_parts = parts.data_ptr();
  a.dv_parts = offset(parts.data_ptr(), math, parts.numel() / 2);
  torch::stable::parallel_for(0, a.batch * a.heads * a.splits, 1, [&](int64_t begin, int64_t end) {
    LINCONV_PICK(linformer_attend_backward)(a, fp64, begin, end);
  });
  for (const auto& [part, out] : {std::pair{a.dk_parts, a.dk}, std::pair{a.dv_parts, a.dv}}) {
    const LinformerSumArgs sum{part, out, a.spans, a.heads, a.splits, a.rank, a.headdim, false, true};
    torch::stable::parallel_for(0, a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
      LINCONV_PICK(linformer_sum)(sum, fp64, begin, end);
    });
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("linformer_project", TORCH_BOX(&linconv::project));
  m.impl("linformer_project_backward", TORCH_BOX(&linconv::project_backward));
  m.impl("linformer_attend", TORCH_BOX(&linconv::attend));
  m.impl("linformer_attend_backward", TORCH_BOX(&linconv::attend_backward));
}
