#include <algorithm>
#include <tuple>

#include "common/tasks.h"
#include "linear/product.h"
#include "linformer/arguments.h"
#include "linformer/kernel.h"

namespace linconv {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kColumnsSummed = 64;  // of hidden states, by a task, at most
constexpr int64_t kTasksOfAThread = 8;  // from which on it matters little that some threads have one more

int64_t most_splits(const std::vector<Span>& spans) {
  int64_t most = 1;
  for (const Span& span : spans) most = std::max(most, linformer_splits(span.end));
  return most;
}

// The valid frames of each row of x (batch, heads, L, headdim).
std::vector<Span> frame_spans(const Tensor& x, const Optional& seq_lens) {
  require_strided(x, 4, "x");
  return sequence_spans(seq_lens, std::nullopt, x.size(0), x.size(2));
}

// `spans` must outlive the result.
LinformerProjectArgs project_arguments(const Tensor& x, const Tensor& proj, bool normalize, const std::vector<Span>& spans) {
  auto a = read_project_arguments<LinformerProjectArgs>(x, proj, normalize);
  a.spans = spans.data();
  a.splits = most_splits(spans);
  return a;
}

// Sums over frames. Both steps are to be run, parts() first.
struct Projection {
  LinformerProjectArgs args;
  std::optional<Tensor> memory;  // of the parts
  bool fp64;

  // A task adds the splits of a sequence up by itself where that leaves no thread idle; the sum is the same, bit for bit.
  Projection(const LinformerProjectArgs& arguments, const View<4>& out) : args(arguments), fp64(out.dtype == DType::kFloat64) {
    args.out = out;
    const int64_t tasks = args.batch * args.heads, threads = torch::stable::get_num_threads();
    if (args.splits == 1 || tasks % threads == 0 || tasks >= kTasksOfAThread * threads) return;
    memory = empty({args.batch, args.heads, args.splits, args.rank, args.headdim}, out.dtype);
    args.parts = memory->data_ptr();
  }

  Tasks parts() const {
    return {args.batch * args.splits_in_memory() * args.heads, [a = args, fp64 = fp64](int64_t begin, int64_t end) {
              LINCONV_PICK(linformer_project)(a, fp64, begin, end);
            }};
  }
  Tasks sum() const {
    const LinformerSumArgs a{args.parts, args.out, args.spans, args.heads, args.splits, args.rank, args.headdim, args.normalize, false};
    return {args.parts != nullptr ? args.batch * args.heads : 0, [a, fp64 = fp64](int64_t begin, int64_t end) {
              LINCONV_PICK(linformer_sum)(a, fp64, begin, end);
            }};
  }
};

Tensor project(Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  const std::vector<Span> spans = frame_spans(x, seq_lens);
  const LinformerProjectArgs a = project_arguments(x, proj, normalize, spans);
  Tensor out = empty({a.batch, a.heads, a.rank, a.headdim}, math_type(a.x.dtype));
  const Projection projection(a, view<4>(out, "out"));
  run(projection.parts());
  run(projection.sum());
  return out;
}

std::tuple<Tensor, Tensor> project_backward(Tensor grad, Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  const std::vector<Span> spans = frame_spans(x, seq_lens);
  LinformerProjectArgs a = project_arguments(x, proj, normalize, spans);
  const DType math = math_type(a.x.dtype);
  const bool fp64 = math == DType::kFloat64;
  add_gradient(a, grad, {a.batch, a.heads, a.rank, a.headdim}, a.x, "x");
  Tensor dx = empty_frames(a.x), dproj = empty({a.proj.size[0], a.proj.size[1], a.rank}, a.proj.dtype);
  Tensor packed = empty({a.batch, a.heads, linformer_packed(a.rank, a.headdim)}, math);
  a.dx = view<4>(dx, "dx");
  a.dproj = view<3>(dproj, "dproj");
  a.packed = packed.data_ptr();
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  run({a.batch * a.heads, [&](int64_t begin, int64_t end) { LINCONV_PICK(linformer_pack)(a, fp64, begin, end); }});
  run({a.batch * blocks(a.frames, kLinformerBlock),
       [&](int64_t begin, int64_t end) { LINCONV_PICK(linformer_unproject)(a, fp64, begin, end); }});
  const int64_t tasks = a.proj.size[0] * blocks(a.proj.size[1], kLinformerBlock) * blocks(a.rank, kLinformerRanks);
  run({tasks, [&](int64_t begin, int64_t end) { LINCONV_PICK(linformer_project_weights)(a, fp64, begin, end); }});
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

Tasks attend_tasks(const LinformerAttendArgs& args) {
  return {args.batch * args.heads * args.query_blocks(), [a = args](int64_t begin, int64_t end) {
            LINCONV_PICK(linformer_attend)(a, a.q.dtype == DType::kFloat64, begin, end);
          }};
}

Tensor attend(Tensor q, Tensor k, Tensor v, double scale, double dropout_p, Optional seed, Optional seq_lens) {
  std::vector<Span> spans;
  LinformerAttendArgs a = attend_arguments(q, k, v, scale, dropout_p, seed, seq_lens, spans);
  Tensor out = empty_frames(a.q);
  a.out = view<4>(out, "out");
  run(attend_tasks(a));
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
  run({a.batch * a.heads * a.splits,
       [&](int64_t begin, int64_t end) { LINCONV_PICK(linformer_attend_backward)(a, fp64, begin, end); }});
  for (const auto& [part, out] : {std::pair{a.dk_parts, a.dk}, std::pair{a.dv_parts, a.dv}}) {
    const LinformerSumArgs sum{part, out, a.spans, a.heads, a.splits, a.rank, a.headdim, false, true};
    run({a.batch * a.heads, [&](int64_t begin, int64_t end) { LINCONV_PICK(linformer_sum)(sum, fp64, begin, end); }});
  }
  return {dq, dk, dv};
}

// Self-attention where keys and values are projected after the sum over frames. Nothing is kept for gradients, and steps
// that need nothing of each other's do not wait for one another.
Tensor self_attention(Tensor hidden, Tensor wq, Optional bq, Tensor wk, Optional bk, Tensor wv, Optional bv, Tensor proj_k,
                      Optional proj_v, int64_t heads, double scale, bool normalize, Optional seq_lens) {
  using torch::stable::transpose;
  const View<3> x = view<3>(hidden, "hidden");
  const int64_t batch = x.size[0], frames = x.size[1], d = x.size[2];
  const int64_t width = view<2>(wq, "wq").size[0], rank = view<3>(proj_k, "proj_k").size[2];
  require(d >= 1, "hidden has no columns, wanted at least 1");
  require(heads >= 1 && width % heads == 0, "num_heads is ", heads, ", wanted a divisor of ", width);
  const DType math = math_type(x.dtype);
  const std::vector<Span> spans = sequence_spans(seq_lens, std::nullopt, batch, frames);

  // Sums of frames, a block of their columns to a task, and of as many ones, which biases are multiplied by; for keys and
  // for values, or for both.
  const int64_t sides = proj_v ? 2 : 1, all_ranks = batch * rank;
  const Tensor sums = empty({sides, all_ranks, d}, math), ones = empty({sides, all_ranks}, math);
  const auto sums_of = [&](int64_t side) { return offset(sums.data_ptr(), math, side * all_ranks * d); };
  const auto ones_of = [&](int64_t side) { return offset(ones.data_ptr(), math, side * all_ranks); };
  int64_t blocks = (d + kColumnsSummed - 1) / kColumnsSummed;
  while (d % blocks != 0) ++blocks;
  const int64_t block = d / blocks;
  const Tensor columns = transpose(torch::stable::view(hidden, {batch, frames, blocks, block}), 1, 2);
  double one64 = 1;
  float one32 = 1;
  void* one = math == DType::kFloat64 ? static_cast<void*>(&one64) : &one32;
  std::vector<Projection> of_frames, of_ones;
  for (int64_t side = 0; side < sides; ++side) {
    LinformerProjectArgs a = project_arguments(columns, side == 0 ? proj_k : *proj_v, normalize, spans);
    require(a.rank == rank, "proj_v has r = ", a.rank, ", wanted ", rank);
    require(a.proj.size[0] == 1, "projections are per head, wanted ones that all heads share");
    of_frames.emplace_back(a, View<4>{sums_of(side), math, {batch, blocks, rank, block}, {rank * d, block, d, 1}});
    a.heads = a.headdim = 1;
    a.x = {one, math, {batch, 1, frames, 1}, {}};
    of_ones.emplace_back(a, View<4>{ones_of(side), math, {batch, 1, rank, 1}, {rank, rank, 1, 1}});
  }

  const Tensor q = empty({batch, frames, width}, x.dtype);
  const Tensor k = empty({batch, rank, width}, math), v = empty({batch, rank, width}, math);
  const Tensor out = empty({batch, frames, width}, x.dtype);
  const auto rows_of = [&](const Tensor& t, DType dtype) {
    return View<2>{t.data_ptr(), dtype, {t.size(0) * t.size(1), width}, {width, 1}};
  };
  require(batch <= 1 || frames == 0 || x.stride[0] == frames * x.stride[1], "hidden: wanted all rows' frames at the same distance");
  const View<2> all_frames{x.data, x.dtype, {batch * frames, d}, {x.stride[1], x.stride[2]}};
  const auto of_sums = [&](const Tensor& weight, const Optional& bias, int64_t side, const Tensor& result) {
    return Product({sums_of(side), math, {all_ranks, d}, {d, 1}}, view<2>(weight, "weight"), view<1>(bias, "bias"),
                   {ones_of(side), math, {all_ranks}, {1}}, rows_of(result, math));
  };
  const Product queries(all_frames, view<2>(wq, "wq"), view<1>(bq, "bq"), {}, rows_of(q, x.dtype));
  const Product keys = of_sums(wk, bk, 0, k), values = of_sums(wv, bv, sides - 1, v);

  const auto by_head = [&](const Tensor& t) {  // (batch, heads, L or r, headdim)
    return transpose(torch::stable::view(t, {batch, t.size(1), heads, width / heads}), 1, 2);
  };
  auto a = read_attend_arguments<LinformerAttendArgs>(by_head(q), by_head(k), by_head(v), scale, 0, std::nullopt);
  a.spans = spans.data();
  a.out = view<4>(by_head(out), "out");

  run(queries.pack());
  const auto all = [](const std::vector<Projection>& of, Tasks (Projection::*tasks)() const) {
    std::vector<Tasks> found;
    for (const Projection& projection : of) found.push_back((projection.*tasks)());
    return chain(std::move(found));
  };
  run_together({queries.multiply(), all(of_frames, &Projection::parts), all(of_ones, &Projection::parts)});
  run_together({all(of_frames, &Projection::sum), all(of_ones, &Projection::sum)});
  run(chain({keys.pack(), values.pack()}));
  run(chain({keys.multiply(), values.multiply()}));
  run(attend_tasks(a));
  return out;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("linformer_project", TORCH_BOX(&linconv::project));
  m.impl("linformer_project_backward", TORCH_BOX(&linconv::project_backward));
  m.impl("linformer_attend", TORCH_BOX(&linconv::attend));
  m.impl("linformer_attend_backward", TORCH_BOX(&linconv::attend_backward));
  m.impl("linformer_self_attention", TORCH_BOX(&linconv::self_attention));
}
