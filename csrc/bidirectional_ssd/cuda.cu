// Both directions of the scan on tensor cores, forward, in one launch: headdim 64, dstate 64 or 128, bfloat16 or float16.
//
// A block walks the chunks of one sequence and head, a warp each 16 columns of headdim, and keeps the state in registers.
// Where x is per direction, so are blocks. Where both directions are summed, the block walks the sequence twice: from its
// end on for the backward direction's states, which it leaves in memory as the factors they will be, and from its start
// on for the results of both.
//
// In a direction's own order of frames v is the inclusive prefix sum of A dt over the chunk, and u is v, or the exclusive
// sum where results are shifted by one step:
//
//     y_i    = sum_j e^{u_i - v_j} dt_j (C_i . B_j) x_j + e^{u_i} C_i S
//     S next = e^{total} S + sum_j e^{total - v_j} dt_j x_j B_j^T
//
// Exponents are of base 2 here. Triangles are cut into tiles of 16 x 16, of which the empty ones are left out.
#include <algorithm>
#include <string>

#include "common/tensor_cores.h"

namespace linconv {
namespace {

constexpr int kChunk = 64, kHeaddim = 64, kTile = 16, kTiles = kChunk / kTile;
constexpr int kWarps = kHeaddim / kTile, kThreads = kWarps * kWarp;
static_assert(kTiles == kWarps);  // a warp has a tile's columns of x, and a tile's rows of the weights

struct Arguments {
  View<5> x, B, C, y;  // (2, batch, L, heads or groups, columns); what directions share has a stride of 0 there
  View<4> dt;
  View<2> A, D, dt_bias;  // D and dt_bias may be absent
  bool x_pieces, B_pieces, C_pieces;  // whether 8 columns from a multiple of 8 on are 16 bytes to be copied at once
  bool sum_D, dt_softplus, once, shifted;
  float dt_min, dt_max;
  Sequences sequences;
  int64_t heads, heads_per_group;
  uint4* states;  // (slots, heads, kStateWords<N>), where the directions are summed
};

// The state that enters a chunk, as each lane's fragments, and behind them the scale of each warp's.
template <int N>
constexpr int kStateWords = kWarps * (N / kTile) * kWarp + 1;

// What the frames of a chunk have from dt, in one direction.
struct Steps {
  float v[kChunk], u[kChunk], dt[kChunk];
  float added[kChunk], kept;  // the factors of x_j B_j^T and of the state in the next state, over `scale`
  float scale, unused[2];
};

template <int N>
struct Shared {
  uint16_t x[2][kChunk * kHeaddim], B[2][kChunk * N], C[2][kChunk * N];
  uint4 weights[kTiles * kTiles][kWarp];
  float weights_scale[kTiles * kTiles];
  Steps steps[2];
};

// ---- float16 ----
//
// What is summed up may leave its range, so it is scaled by a power of two before it becomes a factor, and the
// product is scaled back. bfloat16 has float32's range: all scales are 1.

template <class S>
constexpr bool kScaled = std::is_same_v<S, Float16>;

__device__ inline float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

struct Scale {
  float down = 1, up = 1;
};

// What brings the largest magnitude that any lane of the warp has below 2^(exponent + 1), and back.
template <class S>
__device__ Scale scale_of(float largest, int exponent) {
  if constexpr (kScaled<S>) {
#pragma unroll
    for (int lane = 1; lane < kWarp; lane *= 2) {
      const float other = __shfl_xor_sync(0xffffffff, largest, lane);
      largest = largest < other ? other : largest;
    }
    uint32_t bits;
    memcpy(&bits, &largest, sizeof(bits));
    const int biased = static_cast<int>(bits >> 23 & 255);
    constexpr int kMostUp = 24;  // so that what is added to, scaled too, does not overflow
    int shift = biased == 255 ? 0 : exponent + 127 - biased;
    shift = shift < kMostUp ? shift : kMostUp;
    return {power_of_two(shift), power_of_two(-shift)};
  } else {
    return {};
  }
}

template <int count>
__device__ float largest_of(const Accumulator (&sums)[count]) {
  float out = 0;
#pragma unroll
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float value = sums[i].value[k / 4][k % 4], magnitude = value < 0 ? -value : value;
      out = out < magnitude ? magnitude : out;
    }
  return out;
}

// ---- A block's sequence ----

template <class S, int N>
struct Walk {
  static constexpr int kStateTiles = N / kTile;

  const Arguments& a;
  Shared<N>& shared;
  int warp, lane;
  int64_t head, sequence;
  Span span;
  int64_t length;
  int chunks;
  uint4* states;  // of the first chunk

  __device__ Walk(const Arguments& a, int64_t head, int64_t sequence)
      : a(a),
        shared(*shared_memory<Shared<N>>()),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        head(head),
        sequence(sequence),
        span(a.sequences.sequence(sequence)),
        length(span.end - span.begin),
        chunks(static_cast<int>(ceil_div(length, kChunk))),
        states(a.states ? a.states + (a.sequences.first_slot(sequence, kChunk) * a.heads + head) * kStateWords<N> : nullptr) {}

  // Frames of the sequence from `first` on, which may lie outside of it: zeros then.
  template <int columns>
  __device__ void fetch(const Tile<columns>& tile, const View<5>& view, bool pieces, int direction, int64_t head_or_group,
                        int64_t first) const {
    const S* start = static_cast<const S*>(at(view, direction, span.row, span.begin, head_or_group));
    constexpr int kRows = kThreads / Tile<columns>::kPieces;  // that the block copies at once
    const int piece = threadIdx.x % Tile<columns>::kPieces;
#pragma unroll 2
    for (int row = threadIdx.x / Tile<columns>::kPieces; row < kChunk; row += kRows) {
      const int64_t t = first + row;
      const bool there = 0 <= t && t < length;
      uint16_t* to = tile.piece(row, piece);
      if (pieces) {
        copy_later(to, start + (there ? t * view.stride[2] + piece * 8 : 0), there ? 16 : 0);
      } else {
        for (int e = 0; e < 8; ++e) to[e] = there ? start[t * view.stride[2] + (piece * 8 + e) * view.stride[4]].bits : 0;
      }
    }
  }
  __device__ void fetch_x(int buffer, int direction, int chunk) const {
    fetch(Tile<kHeaddim>{shared.x[buffer]}, a.x, a.x_pieces, direction, head, int64_t(chunk) * kChunk);
  }
  __device__ void fetch_B(int buffer, int direction, int chunk) const {
    fetch(Tile<N>{shared.B[buffer]}, a.B, a.B_pieces, direction, head / a.heads_per_group, int64_t(chunk) * kChunk);
  }
  __device__ void fetch_C(int buffer, int direction, int chunk) const {
    const int one_before = a.shifted ? (direction == 1 ? 1 : -1) : 0;
    fetch(Tile<N>{shared.C[buffer]}, a.C, a.C_pieces, direction, head / a.heads_per_group, int64_t(chunk) * kChunk + one_before);
  }

  // A lane's two frames of a chunk lie one behind the other in the direction's own order.
  __device__ int own_frame(int direction, int k) const {
    const int position = 2 * lane + k;
    return direction == 1 ? kChunk - 1 - position : position;
  }
  // dt as it is in memory.
  __device__ void read_dt(int direction, int chunk, float (&dt)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t t = int64_t(chunk) * kChunk + own_frame(direction, k);
      dt[k] = t < length ? load_element<Tagged, float>(at(a.dt, direction, span.row, span.begin + t, head), a.dt.dtype, 0) : 0;
    }
  }
  // One warp makes the steps of a chunk. Sums are in float64, for weights are powers of their differences.
  __device__ void make_steps(int direction, int chunk, const float (&raw)[2], Steps& steps) const {
    constexpr double kLog2e = 1.4426950408889634;
    const double rate = kLog2e * *static_cast<const float*>(at(a.A, direction, head));
    float dt[2];
    double v[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float step = raw[k];
      if (a.dt_bias.data) step += *static_cast<const float*>(at(a.dt_bias, direction, head));
      if (a.dt_softplus) step = softplus_of(step);
      step = step < a.dt_min ? a.dt_min : step > a.dt_max ? a.dt_max : step;
      dt[k] = int64_t(chunk) * kChunk + own_frame(direction, k) < length ? step : 0;
      v[k] = dt[k] * rate;
    }
    double before = 0, total = v[0] + v[1];
    v[1] = total;
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const double other = __shfl_xor_sync(0xffffffff, total, mask);
      if (lane & mask) before += other;
      total += other;
    }
    float added[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = own_frame(direction, k);
      const double exclusive = before + (k == 0 ? 0 : v[0]);
      steps.v[i] = static_cast<float>(before + v[k]);
      steps.u[i] = a.shifted ? static_cast<float>(exclusive) : steps.v[i];
      steps.dt[i] = dt[k];
      added[k] = exp2_of(static_cast<float>(total) - steps.v[i]) * dt[k];
    }
    const Scale scale = scale_of<S>(added[0] < added[1] ? added[1] : added[0], -1);
#pragma unroll
    for (int k = 0; k < 2; ++k) steps.added[own_frame(direction, k)] = added[k] * scale.down;
    if (lane == 0) {
      steps.kept = exp2_of(static_cast<float>(total)) * scale.down;
      steps.scale = scale.up;
    }
  }

  // The state (of this warp's columns of headdim) behind a chunk. Unrolled, its frames would take more registers than
  // there are.
  __device__ void advance(Accumulator (&state)[kStateTiles], const Tile<kHeaddim>& x, const Tile<N>& B,
                          const Steps& steps) const {
#pragma unroll
    for (int s = 0; s < kStateTiles; ++s)
#pragma unroll
      for (int k = 0; k < 8; ++k) state[s].value[k / 4][k % 4] *= steps.kept;
#pragma unroll 1
    for (int j = 0; j < kTiles; ++j) {
      Fragment scaled = x.transposed(j * kTile, warp * kTile);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* factor = &steps.added[j * kTile + w / 2 * 8 + lane % 4 * 2];
        const uint32_t pair = scaled.word[w];
        scaled.word[w] = pack<S>(unpack<S>(pair, 0) * factor[0], unpack<S>(pair, 1) * factor[1]);
      }
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) multiply<S>(state[s], scaled, B.transposed(j * kTile, s * kTile));
    }
    if constexpr (kScaled<S>)
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s)
#pragma unroll
        for (int k = 0; k < 8; ++k) state[s].value[k / 4][k % 4] *= steps.scale;
  }

  __device__ uint4* stored_state(int chunk) const { return states + chunk * a.heads * kStateWords<N>; }

  // The backward direction's states that enter each chunk, into memory.
  __device__ void sweep_states() const {
    if (chunks == 0) return;
    float dt[2];
    Accumulator state[kStateTiles] = {};
    fetch_x(0, 1, chunks - 1);
    fetch_B(0, 1, chunks - 1);
    if (warp == 0) {
      read_dt(1, chunks - 1, dt);
      make_steps(1, chunks - 1, dt, shared.steps[0]);
    }
    for (int i = 0; i < chunks; ++i) {
      const int chunk = chunks - 1 - i, buffer = i % 2;
      wait_for_copies();
      __syncthreads();
      if (chunk > 0) {
        fetch_x(1 - buffer, 1, chunk - 1);
        fetch_B(1 - buffer, 1, chunk - 1);
        if (warp == 0) read_dt(1, chunk - 1, dt);
      }
      uint4* to = stored_state(chunk);
      const Scale scale = scale_of<S>(kScaled<S> ? largest_of(state) : 0, 14);
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s)
        to[(warp * kStateTiles + s) * kWarp + lane] = words_of(fragment_of<S>(state[s], scale.down));
      if (kScaled<S> && lane == 0) reinterpret_cast<float*>(to + kStateWords<N> - 1)[warp] = scale.up;
      if (chunk == 0) break;
      advance(state, Tile<kHeaddim>{shared.x[buffer]}, Tile<N>{shared.B[buffer]}, shared.steps[buffer]);
      if (warp == 0) make_steps(1, chunk - 1, dt, shared.steps[1 - buffer]);
    }
    __syncthreads();  // the buffers are free
  }

  // This warp's rows of a direction's weights (kChunk, kChunk), into shared memory.
  __device__ void weigh(int direction, const Tile<N>& B, const Tile<N>& C, const Steps& steps) const {
    const bool reverse = direction == 1;
    const int strict = a.shifted || (a.once && reverse) ? 1 : 0;
    Fragment rows[kStateTiles];
#pragma unroll
    for (int s = 0; s < kStateTiles; ++s) rows[s] = C.fragment(warp * kTile, s * kTile);
    for (int j = reverse ? warp : 0; j < (reverse ? kTiles : warp + 1); ++j) {
      Accumulator weights[1] = {};
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) multiply<S>(weights[0], rows[s], B.fragment(j * kTile, s * kTile));
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int row = warp * kTile + lane / 4 + k % 4 / 2 * 8, column = j * kTile + k / 4 * 8 + lane % 4 * 2 + k % 2;
        const bool seen = reverse ? column >= row + strict : column <= row - strict;
        float& weight = weights[0].value[k / 4][k % 4];
        weight = seen ? weight * exp2_of(steps.u[row] - steps.v[column]) * steps.dt[column] : 0;
      }
      const Scale scale = scale_of<S>(kScaled<S> ? largest_of(weights) : 0, 14);
      shared.weights[warp * kTiles + j][lane] = words_of(fragment_of<S>(weights[0], scale.down));
      if (kScaled<S> && lane == 0) shared.weights_scale[warp * kTiles + j] = scale.up;
    }
  }

  // Adds factor times `from` to y, with a factor for each row.
  __device__ static void add_rows(Accumulator& y, const Accumulator& from, float low, float high) {
#pragma unroll
    for (int k = 0; k < 8; ++k) y.value[k / 4][k % 4] += (k % 4 < 2 ? low : high) * from.value[k / 4][k % 4];
  }

  // Adds D x to a row of tiles.
  __device__ void skip(Accumulator& y, const Tile<kHeaddim>& x, int m, float D) const {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint16_t* piece = x.piece(m * kTile + lane / 4 + w % 2 * 8, warp * 2 + w / 2);
      uint32_t pair;
      memcpy(&pair, piece + lane % 4 * 2, sizeof(pair));
      y.value[w / 2][w % 2 * 2] += D * unpack<S>(pair, 0);
      y.value[w / 2][w % 2 * 2 + 1] += D * unpack<S>(pair, 1);
    }
  }

  // Writes what frames of a row of tiles are the sequence's.
  __device__ void write(const Accumulator& y, int direction, int chunk, int m) const {
    const Fragment rounded = fragment_of<S>(y);
    // The four lanes of a row hold four words of it each: word w of all of them goes to lane w, 16 bytes in one place.
    uint32_t word[4] = {rounded.word[0], rounded.word[1], rounded.word[2], rounded.word[3]};
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t &low = word[mask == 1 ? 2 * k : k], &high = word[(mask == 1 ? 2 * k : k) + mask];
        const uint32_t other = __shfl_xor_sync(0xffffffff, lane & mask ? low : high, mask);
        (lane & mask ? low : high) = other;
      }
    const int64_t t = int64_t(chunk) * kChunk + m * kTile + lane / 4 + lane % 2 * 8;
    if (t >= length) return;
    uint16_t* row = static_cast<uint16_t*>(at(a.y, direction, span.row, span.begin + t, head));
    reinterpret_cast<uint4*>(row)[warp * 2 + lane % 4 / 2] = {word[0], word[1], word[2], word[3]};
  }

  // Zeros behind the sequence, to the end of its row or up to the next one.
  __device__ void clear_padding(int direction) const {
    if (a.sequences.packed && sequence + 1 < a.sequences.count) return;
    constexpr int kPieces = Tile<kHeaddim>::kPieces;
    for (int64_t i = threadIdx.x; i < (a.sequences.frames - span.end) * kPieces; i += kThreads) {
      void* row = at(a.y, direction, span.row, span.end + i / kPieces, head);
      static_cast<uint4*>(row)[i % kPieces] = {0, 0, 0, 0};
    }
  }

  // y of one direction; or, summed, of both: a step for each direction of each chunk.
  template <bool kSummed>
  __device__ void sweep_outputs(int only) const {
    const int steps = kSummed ? 2 * chunks : chunks;
    const auto direction_of = [&](int i) { return kSummed ? i % 2 : only; };
    const auto chunk_of = [&](int i) { return kSummed ? i / 2 : only == 1 ? chunks - 1 - i : i; };
    const auto fetch_step = [&](int i) {
      const int direction = direction_of(i), buffer = i % 2;
      if (!kSummed || direction == 0) fetch_x(kSummed ? i / 2 % 2 : buffer, direction, chunk_of(i));
      fetch_B(buffer, direction, chunk_of(i));
      fetch_C(buffer, direction, chunk_of(i));
    };
    float D = 0;
    if (a.D.data) D = *static_cast<const float*>(at(a.D, only, head));
    if (a.sum_D) D += *static_cast<const float*>(at(a.D, 1, head));
    float dt[2];
    Accumulator state[kStateTiles] = {}, y[kSummed ? kTiles : 1];
    if (steps > 0) {
      fetch_step(0);
      if (warp == 0) {
        read_dt(only, chunk_of(0), dt);
        make_steps(only, chunk_of(0), dt, shared.steps[0]);
      }
    }
    for (int i = 0; i < steps; ++i) {
      const int direction = direction_of(i), buffer = i % 2, chunk = chunk_of(i);
      const bool own_state = !kSummed || direction == 0;
      const Tile<kHeaddim> x{shared.x[kSummed ? i / 2 % 2 : buffer]};
      const Tile<N> B{shared.B[buffer]}, C{shared.C[buffer]};
      const Steps& now = shared.steps[buffer];
      wait_for_copies();
      __syncthreads();
      // The warp with the fewest weights makes the next steps.
      const bool makes_steps = i + 1 < steps && warp == (direction == 1 ? kWarps - 1 : 0);
      if (i + 1 < steps) fetch_step(i + 1);
      if (makes_steps) read_dt(direction_of(i + 1), chunk_of(i + 1), dt);

      weigh(direction, B, C, now);
      if (makes_steps) make_steps(direction_of(i + 1), chunk_of(i + 1), dt, shared.steps[1 - buffer]);

      Fragment entering[kStateTiles];
      Scale scale;
      if (own_state) {
        scale = scale_of<S>(kScaled<S> ? largest_of(state) : 0, 14);
#pragma unroll
        for (int s = 0; s < kStateTiles; ++s) entering[s] = fragment_of<S>(state[s], scale.down);
      } else {
        const uint4* from = stored_state(chunk);
#pragma unroll
        for (int s = 0; s < kStateTiles; ++s) entering[s] = fragment_of(from[(warp * kStateTiles + s) * kWarp + lane]);
        if constexpr (kScaled<S>) scale.up = reinterpret_cast<const float*>(from + kStateWords<N> - 1)[warp];
      }
      Fragment columns[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) columns[j] = x.transposed(j * kTile, warp * kTile);
      __syncthreads();  // all weights are there
#pragma unroll(kSummed ? kTiles : 1)
      for (int m = 0; m < kTiles; ++m) {
        Accumulator& rows = y[kSummed ? m : 0];
        if (own_state) rows = {};
        Accumulator from = {};
#pragma unroll
        for (int s = 0; s < kStateTiles; ++s) multiply<S>(from, C.fragment(m * kTile, s * kTile), entering[s]);
        const float* u = &now.u[m * kTile + lane / 4];
        add_rows(rows, from, exp2_of(u[0]) * scale.up, exp2_of(u[8]) * scale.up);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (direction == 1 ? j < m : j > m) continue;
          const Fragment weights = fragment_of(shared.weights[m * kTiles + j][lane]);
          if constexpr (kScaled<S>) {
            from = {};
            multiply<S>(from, weights, columns[j]);
            const float up = shared.weights_scale[m * kTiles + j];
            add_rows(rows, from, up, up);
          } else {
            multiply<S>(rows, weights, columns[j]);
          }
        }
        if (!kSummed || direction == 1) {
          skip(rows, x, m, D);
          write(rows, kSummed ? 0 : direction, chunk, m);
        }
      }
      if (own_state) advance(state, x, B, now);
    }
    clear_padding(kSummed ? 0 : only);
  }
};

template <class S, int N, bool kSummed>
__global__ void __launch_bounds__(kThreads, 2) scan(const Arguments a) {
  constexpr int kWays = kSummed ? 1 : 2;
  const int64_t block = blockIdx.x;
  const Walk<S, N> walk(a, block % a.heads, block / a.heads / kWays);
  if constexpr (kSummed) walk.sweep_states();
  walk.template sweep_outputs<kSummed>(static_cast<int>(block / a.heads % kWays));
}

// ---- The call ----

// A tensor with an axis of directions before it, or as if it had one.
template <int N>
View<N> per_direction(const Tensor& tensor, const char* name) {
  if (tensor.dim() == N) return view<N>(tensor, name);
  const View<N - 1> shared = view<N - 1>(tensor, name);
  View<N> out{shared.data, shared.dtype, {2}, {0}};
  std::copy_n(shared.size, N - 1, out.size + 1);
  std::copy_n(shared.stride, N - 1, out.stride + 1);
  return out;
}
template <int N>
View<N> per_direction(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? per_direction<N>(*tensor, name) : View<N>{};
}

void require_float(const View<2>& view, const char* name) {
  require(view.data == nullptr || view.dtype == DType::kFloat32, name, " is not of the math dtype");
}

bool in_pieces(const View<5>& view) {
  int64_t bits = reinterpret_cast<int64_t>(view.data);
  for (int i = 0; i < 4; ++i)
    if (view.size[i] > 1) bits |= view.stride[i] * element_size(view.dtype);
  return view.stride[4] == 1 && bits % 16 == 0;
}

template <class S, int N>
void run(const Launcher& launch, const Arguments& a, bool summed) {
  const int64_t blocks = a.sequences.count * a.heads * (summed ? 1 : 2);
  launch(summed ? scan<S, N, true> : scan<S, N, false>, grid_dim(blocks, kGridX, "sequences, heads and directions"), kThreads,
         static_cast<int64_t>(sizeof(Shared<N>)), a);
}

Tensor bidirectional_ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
                         std::optional<Tensor> dt_bias, bool dt_softplus, double dt_min, double dt_max, std::string diagonal,
                         std::optional<Tensor> seq_lens, std::optional<Tensor> cu_seqlens) {
  require(diagonal == "both" || diagonal == "once" || diagonal == "shifted", "diagonal is '", diagonal,
          "', wanted 'both', 'once' or 'shifted'");
  const Launcher launch(x);
  Arguments a{};
  a.x = per_direction<5>(x, "x");
  a.dt = per_direction<4>(dt, "dt");
  a.A = per_direction<2>(A, "A");
  a.B = per_direction<5>(B, "B");
  a.C = per_direction<5>(C, "C");
  a.D = per_direction<2>(D, "D");
  a.dt_bias = per_direction<2>(dt_bias, "dt_bias");
  const auto [directions, batch, length, heads, headdim] = a.x.size;
  const int64_t groups = a.B.size[3], dstate = a.B.size[4];
  const DType type = a.x.dtype;
  require(type == DType::kBFloat16 || type == DType::kFloat16, "x has dtype ", torch::headeronly::toString(x.scalar_type()),
          ", the CUDA kernel wants BFloat16 or Half");
  require(a.B.dtype == type && a.C.dtype == type, "B and C are not of x's dtype, as the CUDA kernel wants");
  require(headdim == kHeaddim, "headdim is ", headdim, ", the CUDA kernel wants ", kHeaddim);
  require(dstate == 64 || dstate == 128, "dstate is ", dstate, ", the CUDA kernel wants 64 or 128");
  require(groups > 0 && heads % groups == 0, "B has ", groups, " groups, wanted a divisor of the ", heads, " heads of x");
  require(directions == 2, "x has size ", directions, " in dimension 0, wanted 2");
  require_sizes(a.dt, {2, batch, length, heads}, "dt");
  require_sizes(a.A, {2, heads}, "A");
  require_sizes(a.B, {2, batch, length, groups, dstate}, "B");
  require_sizes(a.C, {2, batch, length, groups, dstate}, "C");
  if (D) require_sizes(a.D, {2, heads}, "D");
  if (dt_bias) require_sizes(a.dt_bias, {2, heads}, "dt_bias");
  require_float(a.A, "A");
  require_float(a.D, "D");
  require_float(a.dt_bias, "dt_bias");
  const bool summed = x.dim() == 4;
  a.x_pieces = in_pieces(a.x);
  a.B_pieces = in_pieces(a.B);
  a.C_pieces = in_pieces(a.C);
  a.sum_D = summed && D && D->dim() == 2;
  a.dt_softplus = dt_softplus;
  a.once = diagonal == "once";
  a.shifted = diagonal == "shifted";
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.sequences = sequences_of(seq_lens, cu_seqlens, batch, length);
  a.heads = heads;
  a.heads_per_group = heads / groups;
  Tensor y = empty_as(x, type);
  if (a.sequences.count == 0) torch::stable::zero_(y);  // no block has it
  a.y = per_direction<5>(y, "y");
  std::optional<Tensor> states;
  if (summed) {
    const int64_t words = dstate == 64 ? kStateWords<64> : kStateWords<128>;
    states = empty({a.sequences.slots(kChunk), heads, words, 4}, DType::kFloat32);
    a.states = static_cast<uint4*>(states->mutable_data_ptr());
  }
  if (type == DType::kBFloat16) {
    dstate == 64 ? run<BFloat16, 64>(launch, a, summed) : run<BFloat16, 128>(launch, a, summed);
  } else {
    dstate == 64 ? run<Float16, 64>(launch, a, summed) : run<Float16, 128>(launch, a, summed);
  }
  return y;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) { m.impl("bidirectional_ssd", TORCH_BOX(&linconv::bidirectional_ssd)); }
