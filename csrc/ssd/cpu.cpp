#include <algorithm>
#include <cstring>

#include "common/sums.h"
#include "common/tasks.h"
#include "ssd/cut.h"
#include "ssd/scan.h"

namespace linconv {
namespace {

// About how many operations, for each entry of the state: of a frame, of what it adds to the state, and of passing the state
// by a chunk. They tell how many threads are worth it.
constexpr int64_t kForward = 8, kBackward = 20, kAdding = 2, kPassing = 2;

SsdTensor frames(const Tensor& tensor, int dims, int directions, const char* name) {
  const int leading = static_cast<int>(tensor.dim()) - dims;
  require(leading == 0 || (leading == 1 && directions == 2 && tensor.size(0) == 2), name, " has ", tensor.dim(),
          " dimensions, wanted ", dims, directions == 2 ? " or a leading axis of 2 before them" : "");
  require_strided(tensor, tensor.dim(), name);
  const auto stride = [&](int i) { return tensor.stride(leading + i); };
  return {tensor.data_ptr(), dtype_of(tensor, name), leading ? tensor.stride(0) : 0, stride(0), stride(1), stride(2),
          dims == 4 ? stride(3) : 0};
}

void require_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  const int64_t leading = tensor.dim() - static_cast<int64_t>(sizes.size());
  int64_t i = leading;
  require(leading >= 0, name, " has ", tensor.dim(), " dimensions, wanted at least ", sizes.size());
  for (const int64_t size : sizes) {
    require(tensor.size(i) == size, name, " has size ", tensor.size(i), " in dimension ", i, ", wanted ", size);
    ++i;
  }
}

// A per-head parameter as (directions, heads), contiguous.
Tensor per_head(const Tensor& tensor, int directions, int64_t heads, DType math, const char* name) {
  require(tensor.dim() == 1 || (tensor.dim() == 2 && directions == 2 && tensor.size(0) == 2), name, " has ", tensor.dim(),
          " dimensions, wanted (heads,)", directions == 2 ? " or (2, heads)" : "");
  require_shape(tensor, {heads}, name);
  require_strided(tensor, tensor.dim(), name);
  require(dtype_of(tensor, name) == math, name, " is not of the math dtype");
  Tensor out = empty({directions, heads}, math);
  const int64_t size = element_size(math), stride = tensor.stride(tensor.dim() - 1);
  for (int d = 0; d < directions; ++d)
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(offset(out.mutable_data_ptr(), math, d * heads + h),
                  offset(tensor.data_ptr(), math, (tensor.dim() == 2 ? d * tensor.stride(0) : 0) + h * stride), size);
  return out;
}

// What the arguments' memory is owned by while kernels run.
struct Prepared {
  DType math;
  std::vector<Span> spans;
  std::optional<Tensor> A, D, dt_bias, initial_states;
};

bool per_direction(const Tensor& tensor, int64_t dims) { return tensor.dim() > dims; }

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

std::optional<Tensor> states(const std::optional<Tensor>& tensor, const SsdArgs& args, DType math, const char* name) {
  if (!tensor) return std::nullopt;
  require(dtype_of(*tensor, name) == math, name, " is not of the math dtype");
  require_strided(*tensor, 4, name);
  require_shape(*tensor, {args.sequences, args.heads, args.headdim, args.dstate}, name);
  return torch::stable::contiguous(*tensor);
}

// Fills what forward and backward share.
Prepared prepare(const Scan& scan, SsdArgs& args) {
  Prepared held;
  args.directions = scan.directions;
  args.x = frames(scan.x, 4, scan.directions, "x");
  args.dt = frames(scan.dt, 3, scan.directions, "dt");
  args.B = frames(scan.B, 4, scan.directions, "B");
  args.C = frames(scan.C, 4, scan.directions, "C");
  held.math = math_type(args.x.dtype);
  const int64_t x_axis = scan.x.dim() - 4, B_axis = scan.B.dim() - 4;
  const int64_t batch = scan.x.size(x_axis), length = scan.x.size(x_axis + 1), heads = scan.x.size(x_axis + 2);
  const int64_t groups = scan.B.size(B_axis + 2), dstate = scan.B.size(B_axis + 3), headdim = scan.x.size(x_axis + 3);
  require(1 <= headdim && headdim <= 256, "headdim is ", headdim, ", wanted 1 to 256");
  require(1 <= dstate && dstate <= 256, "dstate is ", dstate, ", wanted 1 to 256");
  require(groups > 0 && heads % groups == 0, "B has ", groups, " groups, wanted a divisor of the ", heads, " heads of x");
  require_shape(scan.dt, {batch, length, heads}, "dt");
  require_shape(scan.B, {batch, length, groups, dstate}, "B");
  require_shape(scan.C, {batch, length, groups, dstate}, "C");
  require_math(scan.dt, held.math, "dt");
  require_math(scan.B, held.math, "B");
  require_math(scan.C, held.math, "C");
  constexpr int64_t kMost = 1 << 20;  // so that numbers of tasks are far from their type's end
  require(heads <= kMost && groups <= kMost, "x has ", heads, " heads and B ", groups, " groups, wanted at most ", kMost);
  args.heads = static_cast<int>(heads);
  args.groups = static_cast<int>(groups);
  args.headdim = static_cast<int>(headdim);
  args.dstate = static_cast<int>(dstate);
  args.frames = length;
  args.packed = scan.cu_seqlens.has_value();
  held.spans = sequence_spans(scan.seq_lens, scan.cu_seqlens, batch, length);
  args.spans = held.spans.data();
  args.sequences = static_cast<int64_t>(held.spans.size());
  args.direction[0] = scan.direction[0];
  args.direction[1] = scan.direction[1];
  args.summed = scan.directions == 2 && !per_direction(scan.x, 4);
  args.shifted = scan.shifted;
  held.A = per_head(scan.A, scan.directions, heads, held.math, "A");
  if (scan.D) {
    held.D = per_head(*scan.D, scan.directions, heads, held.math, "D");
    if (args.summed && !per_direction(*scan.D, 1))  // stands once in the sum
      std::memset(offset(held.D->mutable_data_ptr(), held.math, heads), 0, heads * element_size(held.math));
  }
  if (scan.dt_bias) held.dt_bias = per_head(*scan.dt_bias, scan.directions, heads, held.math, "dt_bias");
  held.initial_states = states(scan.initial_states, args, held.math, "initial_states");
  args.A = data(held.A);
  args.D = data(held.D);
  args.dt_bias = data(held.dt_bias);
  args.initial_states = data(held.initial_states);
  args.dt_softplus = scan.dt_softplus;
  args.dt_min = scan.dt_min;
  args.dt_max = scan.dt_max;
  return held;
}

SsdTensor contiguous_frames(const Tensor& tensor, int64_t directions, int64_t batch, int64_t length, int64_t heads,
                            int64_t columns, DType dtype) {
  return {tensor.data_ptr(), dtype, directions > 1 ? batch * length * heads * columns : 0, length * heads * columns,
          heads * columns, columns, 1};
}

}  // namespace

std::tuple<Tensor, Tensor> scan_forward(const Scan& scan) {
  SsdForwardArgs args{};
  const Prepared held = prepare(scan, args);
  const int64_t batch = scan.x.size(scan.x.dim() - 4);
  Tensor y = empty_as(scan.x, args.x.dtype);
  args.y = contiguous_frames(y, args.summed ? 1 : args.directions, batch, args.frames, args.heads, args.headdim, args.x.dtype);
  std::initializer_list<int64_t> none{0};
  Tensor final_states = scan.directions == 1 ? empty({args.sequences, args.heads, args.headdim, args.dstate}, held.math)
                                             : empty(none, held.math);
  args.final_states = scan.directions == 1 ? final_states.mutable_data_ptr() : nullptr;
  const auto forward = [&](SsdStage stage, int64_t tasks, int64_t operations) {
    const auto work = [&args, &held, stage](int64_t begin, int64_t end) {
      LINCONV_PICK(ssd_forward)(args, stage, held.math == DType::kFloat64, begin, end);
    };
    run({tasks, work, operations});
  };
  const Chunks chunks(args);
  const int ways = args.summed ? 1 : args.directions;
  if (cut_forward(args, ways, chunks.count(), StatesInMemory::size(args) * element_size(held.math))) {
    const int64_t at_once = chunks_at_once(args, ways, chunks.count());
    StatesInMemory states(args, held.math, ways, at_once);
    const std::optional<Tensor> summed = args.staged(args.y.dtype) ? std::optional(empty_as(y, held.math)) : std::nullopt;
    args.summed_in = summed ? summed->mutable_data_ptr() : nullptr;
    for (int direction = 0; direction < args.directions; direction += ways)
      for (int64_t first = 0; first < chunks.count(); first += at_once) {
        args.states = states.of(chunks.range(direction, ways, first, std::min(at_once, chunks.count() - first)));
        const int64_t tasks = args.tasks_of_chunks(args.states), entries = args.entries_of_states(args.states);
        forward(SsdStage::kAdded, tasks, kAdding * kSsdChunk * entries);
        forward(SsdStage::kPassed, args.tasks_of_rows(args.states, args.dstate), kPassing * entries);
        forward(SsdStage::kResults, tasks, kForward * kSsdChunk * entries);
      }
    const Chunks pieces(args, true);
    args.pieces = pieces.all(0, ways);
    if (summed || args.padded()) forward(SsdStage::kFinished, args.tasks_of_chunks(args.pieces), y.numel());
  } else {
    forward(SsdStage::kWhole, args.tasks(), kForward * scan.x.numel() * args.dstate);
  }
  return {y, final_states};
}

ScanGradients scan_backward(const Scan& scan, const Tensor& dy, const std::optional<Tensor>& dfinal_states) {
  SsdBackwardArgs args{};
  const Prepared held = prepare(scan, args);
  const DType math = held.math;
  const int64_t batch = scan.x.size(scan.x.dim() - 4), length = args.frames, directions = args.directions;
  const int64_t heads = args.heads, groups = args.groups, dstate = args.dstate;
  require_shape(dy, {batch, length, heads, args.headdim}, "dy");
  require(dy.dim() == scan.x.dim(), "dy has ", dy.dim(), " dimensions, wanted those of x");
  require_math(dy, math, "dy");
  args.dy = frames(dy, 4, scan.directions, "dy");
  const std::optional<Tensor> dfinal = states(dfinal_states, args, math, "dfinal_states");
  args.dfinal_states = data(dfinal);
  // Fixed, so that sums over heads come out the same for any number of threads and any batch.
  args.head_block = std::clamp(args.group_heads(), 1, kSsdBackwardHeads);
  args.column_block = args.headdim;

  Tensor dx = empty_as(scan.x, args.x.dtype);
  args.dx = contiguous_frames(dx, args.summed ? 1 : directions, batch, length, heads, args.headdim, args.x.dtype);
  const int64_t blocks = args.head_blocks(), dt_size = batch * length * heads, BC_size = batch * length * groups * dstate;
  Tensor ddt = empty({directions, dt_size}, math);
  args.ddt = contiguous_frames(ddt, directions, batch, length, heads, 1, math);
  Tensor dB = empty({blocks, directions, BC_size}, math), dC = empty({blocks, directions, BC_size}, math);
  args.dB = contiguous_frames(dB, directions, batch, length, groups, dstate, math);
  args.dC = contiguous_frames(dC, directions, batch, length, groups, dstate, math);
  args.dBC_block = directions * BC_size;
  const auto sums = [&] { return empty({args.sequences, directions, heads}, math); };
  Tensor dA = sums(), dD = sums(), ddt_bias = sums();
  args.dA = dA.mutable_data_ptr();
  args.dD = scan.D ? dD.mutable_data_ptr() : nullptr;
  args.ddt_bias = scan.dt_bias ? ddt_bias.mutable_data_ptr() : nullptr;
  const std::initializer_list<int64_t> none{0};
  Tensor dinitial = held.initial_states ? empty_as(*held.initial_states, math) : empty(none, math);
  args.dinitial_states = held.initial_states ? dinitial.mutable_data_ptr() : nullptr;

  const auto backward = [&](SsdStage stage, int64_t tasks, int64_t operations) {
    const auto work = [&args, math, stage](int64_t begin, int64_t end) {
      LINCONV_PICK(ssd_backward)(args, stage, math == DType::kFloat64, begin, end);
    };
    run({tasks, work, operations});
  };
  const Chunks chunks(args);
  const int ways = backward_ways(args, math, chunks.count());
  if (cut_backward(args, ways, chunks.count())) {
    const int64_t at_once = chunks_at_once(args, ways, chunks.count());
    StatesInMemory states(args, math, ways, chunks.count()), dstates(args, math, ways, at_once);
    Tensor sums_of_chunks = empty({chunks.count(), directions, heads, 3}, DType::kFloat64);
    args.sums = static_cast<double*>(sums_of_chunks.mutable_data_ptr());
    const std::optional<Tensor> summed = args.staged(args.dx.dtype) ? std::optional(empty_as(dx, math)) : std::nullopt;
    args.summed_in = summed ? summed->mutable_data_ptr() : nullptr;
    const auto stages = [&](SsdStage added, SsdStage passed, const SsdStates& states) {
      const int64_t entries = args.entries_of_states(states);
      backward(added, args.tasks_of_chunks(states), kAdding * kSsdChunk * entries);
      backward(passed, args.tasks_of_rows(states, args.headdim), kPassing * entries);
    };
    for (int direction = 0; direction < directions; direction += ways) {
      args.states = states.of(chunks.all(direction, ways));
      stages(SsdStage::kAdded, SsdStage::kPassed, args.states);
      for (int64_t first = (chunks.count() - 1) / at_once * at_once; first >= 0; first -= at_once) {
        args.dstates = dstates.of(chunks.range(direction, ways, first, std::min(at_once, chunks.count() - first)));
        stages(SsdStage::kGradientsAdded, SsdStage::kGradientsPassed, args.dstates);
        backward(SsdStage::kResults, args.tasks_of_chunks(args.dstates), kBackward * kSsdChunk * args.entries_of_states(args.dstates));
      }
    }
    const Chunks pieces(args, true);
    args.pieces = pieces.all(0, args.summed ? 1 : args.directions);
    backward(SsdStage::kFinished, args.tasks_of_chunks(args.pieces), dx.numel());
  } else {
    backward(SsdStage::kWhole, args.tasks(), kBackward * scan.x.numel() * dstate);
  }

  const auto of_directions = [&](const Tensor& argument, int64_t dims) { return per_direction(argument, dims) ? 1 : directions; };
  const auto per_head_sum = [&](const Tensor& parts, const Tensor& argument, const char* name, bool first_only) {
    return sum_of_parts(parts, argument, name, args.sequences, directions * heads,
                     first_only ? 1 : of_directions(argument, 1), heads);
  };
  const auto group_sum = [&](const Tensor& parts, const Tensor& argument, const char* name) {
    return sum_of_parts(parts, argument, name, blocks, args.dBC_block, of_directions(argument, 4), BC_size);
  };
  return {dx,
          sum_of_parts(ddt, scan.dt, "dt", 1, 0, of_directions(scan.dt, 3), dt_size),
          per_head_sum(dA, scan.A, "A", false),
          group_sum(dB, scan.B, "B"),
          group_sum(dC, scan.C, "C"),
          scan.D ? per_head_sum(dD, *scan.D, "D", args.summed) : empty(none, math),
          scan.dt_bias ? per_head_sum(ddt_bias, *scan.dt_bias, "dt_bias", false) : empty(none, math),
          dinitial};
}

namespace {

using Optional = const std::optional<Tensor>&;

Scan one_direction(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, Optional D,
                   Optional dt_bias, bool dt_softplus, double dt_min, double dt_max, Optional initial_states,
                   Optional seq_lens, Optional cu_seqlens, bool reverse) {
  return {x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens, cu_seqlens,
          1, {{reverse, false}, {}}, false};
}

std::tuple<Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                               Optional D, Optional dt_bias, bool dt_softplus, double dt_min, double dt_max,
                               Optional initial_states, Optional seq_lens, Optional cu_seqlens, bool reverse) {
  return scan_forward(one_direction(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens,
                                    cu_seqlens, reverse));
}

ScanGradients ssd_backward(const Tensor& dy, Optional dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
                           const Tensor& B, const Tensor& C, Optional D, Optional dt_bias, bool dt_softplus, double dt_min,
                           double dt_max, Optional initial_states, Optional seq_lens, Optional cu_seqlens, bool reverse) {
  return scan_backward(one_direction(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens,
                                     cu_seqlens, reverse),
                       dy, dfinal_states);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(linconv, CPU, m) {
  m.impl("ssd", TORCH_BOX(&ssd));
  m.impl("ssd_backward", TORCH_BOX(&ssd_backward));
}

}  // namespace linconv
