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

// What the frames of a chunk have from dt, in one direction; two neighbours' lie together, as a lane takes them.
struct Steps {
  struct alignas(16) {
    float v[2], dt[2];
  } columns[kChunk / 2];
  struct alignas(8) {
    float of[2];  // the factors of x_j B_j^T in the next state, over `scale`
  } added[kChunk / 2];
  float u[kChunk];
  float kept, scale;  // the factor of the state in the next one, over `scale`
};

template <int N>
struct Shared {
  uint16_t x[2][kChunk * kHeaddim], B[2][kChunk * N], C[2][kChunk * N];
  uint4 weights[kTiles * kTiles][kWarp];
  Steps steps[2];
  float weights_scale[kTiles * kTiles];
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

  // ---- Reading ----

  // What this thread copies of a tensor's first frames; the same of later ones is so many strides further on.
  template <int columns>
  __device__ const S* own_piece(const View<5>& view, int direction, int64_t head_or_group) const {
    const int row = threadIdx.x / Tile<columns>::kPieces, piece = threadIdx.x % Tile<columns>::kPieces;
    return static_cast<const S*>(at(view, direction, span.row, span.begin + row, head_or_group, piece * 8));
  }
  __device__ const S* own_x(int direction) const { return own_piece<kHeaddim>(a.x, direction, head); }
  __device__ const S* own_B(int direction) const { return own_piece<N>(a.B, direction, head / a.heads_per_group); }
  __device__ const S* own_C(int direction) const { return own_piece<N>(a.C, direction, head / a.heads_per_group); }

  // Frames of the sequence from `first` on, which may lie outside of it: zeros then.
  template <int columns>
  __device__ void fetch(const Tile<columns>& tile, const View<5>& view, bool pieces, const S* own, int64_t first) const {
    constexpr int kRows = kThreads / Tile<columns>::kPieces;  // that the block copies at once
    static_assert(kRows % 8 == 0);                            // so that rows of one thread are permuted alike
    const int row = threadIdx.x / Tile<columns>::kPieces;
    uint16_t* to = tile.piece(row, threadIdx.x % Tile<columns>::kPieces);
    const S* from = own + first * view.stride[2];
    const int64_t step = kRows * view.stride[2];
    if (pieces && first >= 0 && first + kChunk <= length) {
#pragma unroll
      for (int r = 0; r < kChunk; r += kRows, from += step) copy_later(to + r * columns, from, 16);
      return;
    }
#pragma unroll 1
    for (int r = 0; r < kChunk; r += kRows, from += step) {
      const bool there = 0 <= first + row + r && first + row + r < length;
      if (pieces) {
        copy_later(to + r * columns, there ? from : own, there ? 16 : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) to[r * columns + e] = there ? from[e * view.stride[4]].bits : 0;
      }
    }
  }
  __device__ void fetch_x(int buffer, const S* own, int chunk) const {
    fetch(Tile<kHeaddim>{shared.x[buffer]}, a.x, a.x_pieces, own, int64_t(chunk) * kChunk);
  }
  __device__ void fetch_B(int buffer, const S* own, int chunk) const {
    fetch(Tile<N>{shared.B[buffer]}, a.B, a.B_pieces, own, int64_t(chunk) * kChunk);
  }
  template <int direction>
  __device__ void fetch_C(int buffer, const S* own, int chunk) const {
    const int one_before = a.shifted ? (direction == 1 ? 1 : -1) : 0;
    fetch(Tile<N>{shared.C[buffer]}, a.C, a.C_pieces, own, int64_t(chunk) * kChunk + one_before);
  }

  // ---- Steps ----

  // A lane's two frames of a chunk lie one behind the other in the direction's own order.
  template <int direction>
  __device__ int own_frame(int k) const {
    static_assert(kChunk == 2 * kWarp);
    const int position = 2 * lane + k;
    return direction == 1 ? kChunk - 1 - position : position;
  }
  // dt as it is in memory.
  template <int direction>
  __device__ void read_dt(int chunk, float (&dt)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t t = int64_t(chunk) * kChunk + own_frame<direction>(k);
      dt[k] = t < length ? load_element<Tagged, float>(at(a.dt, direction, span.row, span.begin + t, head), a.dt.dtype, 0) : 0;
    }
  }
  // One warp makes the steps of a chunk. Sums are in float64, for weights are powers of their differences.
  template <int direction>
  __device__ void make_steps(int chunk, const float (&raw)[2], Steps& steps) const {
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
      dt[k] = int64_t(chunk) * kChunk + own_frame<direction>(k) < length ? step : 0;
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
    const int pair = own_frame<direction>(0) / 2;
    float added[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int place = direction == 1 ? 1 - k : k;
      const float inclusive = static_cast<float>(before + v[k]), exclusive = static_cast<float>(before + (k == 0 ? 0 : v[0]));
      steps.columns[pair].v[place] = inclusive;
      steps.columns[pair].dt[place] = dt[k];
      steps.u[own_frame<direction>(k)] = a.shifted ? exclusive : inclusive;
      added[k] = exp2_of(static_cast<float>(total) - inclusive) * dt[k];
    }
    const Scale scale = scale_of<S>(added[0] < added[1] ? added[1] : added[0], -1);
#pragma unroll
    for (int k = 0; k < 2; ++k) steps.added[pair].of[direction == 1 ? 1 - k : k] = added[k] * scale.down;
    if (lane == 0) {
      steps.kept = exp2_of(static_cast<float>(total)) * scale.down;
      steps.scale = scale.up;
    }
  }

  // ---- States ----

  // This warp's columns of x, as rows, at a tile's frames.
  __device__ RightFragment columns_of(const Tile<kHeaddim>& x, int j) const { return x.right_transposed(j * kTile, warp * kTile); }

  // The state (of this warp's columns of headdim) behind a chunk. column(j) is columns_of(x, j).
  template <class Column>
  __device__ void advance(Accumulator (&state)[kStateTiles], Column column, const Tile<N>& B, const Steps& steps) const {
#pragma unroll
    for (int s = 0; s < kStateTiles; ++s)
#pragma unroll
      for (int k = 0; k < 8; ++k) state[s].value[k / 4][k % 4] *= steps.kept;
#pragma unroll(kScaled<S> ? 1 : kTiles)
    for (int j = 0; j < kTiles; ++j) {
      const RightFragment own = column(j);
      Fragment scaled;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto factor = steps.added[j * (kTile / 2) + w / 2 * 4 + lane % 4];
        const uint32_t pair = own.word[left_word(w)];
        scaled.word[w] = pack<S>(unpack<S>(pair, 0) * factor.of[0], unpack<S>(pair, 1) * factor.of[1]);
      }
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) multiply<S>(state[s], scaled, B.right_transposed(j * kTile, s * kTile));
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
    const S *own_x_piece = own_x(1), *own_B_piece = own_B(1);
    float dt[2];
    Accumulator state[kStateTiles] = {};
    fetch_x(0, own_x_piece, chunks - 1);
    fetch_B(0, own_B_piece, chunks - 1);
    if (warp == 0) {
      read_dt<1>(chunks - 1, dt);
      make_steps<1>(chunks - 1, dt, shared.steps[0]);
    }
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
      const int chunk = chunks - 1 - i, buffer = i % 2;
      wait_for_copies();
      __syncthreads();
      if (chunk > 0) {
        fetch_x(1 - buffer, own_x_piece, chunk - 1);
        fetch_B(1 - buffer, own_B_piece, chunk - 1);
        if (warp == 0) read_dt<1>(chunk - 1, dt);
      }
      uint4* to = stored_state(chunk);
      const Scale scale = scale_of<S>(kScaled<S> ? largest_of(state) : 0, 14);
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s)
        to[(warp * kStateTiles + s) * kWarp + lane] = words_of(fragment_of<S, RightFragment>(state[s], scale.down));
      if (kScaled<S> && lane == 0) reinterpret_cast<float*>(to + kStateWords<N> - 1)[warp] = scale.up;
      if (chunk == 0) break;
      const Tile<kHeaddim> x{shared.x[buffer]};
      advance(state, [&](int j) { return columns_of(x, j); }, Tile<N>{shared.B[buffer]}, shared.steps[buffer]);
      if (warp == 0) make_steps<1>(chunk - 1, dt, shared.steps[1 - buffer]);
    }
    __syncthreads();  // the buffers are free
  }

  // ---- Outputs ----

  // This warp's rows of a direction's weights (kChunk, kChunk), into shared memory.
  template <int direction>
  __device__ void weigh(const Tile<N>& B, const Tile<N>& C, const Steps& steps) const {
    const int strict = a.shifted || (a.once && direction == 1) ? 1 : 0;
    const float u[2] = {steps.u[warp * kTile + lane / 4], steps.u[warp * kTile + lane / 4 + 8]};
    Fragment rows[kStateTiles];
#pragma unroll
    for (int s = 0; s < kStateTiles; ++s) rows[s] = C.fragment(warp * kTile, s * kTile);
    const auto weigh_tile = [&](int j, auto on_diagonal) {
      // Two sums at a time: products that wait for one another take as long as a warp's all others.
      Accumulator weights[1] = {}, others = {};
#pragma unroll
      for (int s = 0; s < kStateTiles; s += 2) {
        multiply<S>(weights[0], rows[s], B.right_fragment(j * kTile, s * kTile));
        multiply<S>(others, rows[s + 1], B.right_fragment(j * kTile, (s + 1) * kTile));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto columns = steps.columns[j * (kTile / 2) + half * 4 + lane % 4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float& weight = weights[0].value[half][k];
          weight = (weight + others.value[half][k]) * (exp2_of(u[k / 2] - columns.v[k % 2]) * columns.dt[k % 2]);
          if constexpr (decltype(on_diagonal)::value) {
            const int after = lane / 4 + k / 2 * 8 - (half * 8 + lane % 4 * 2 + k % 2);
            weight = (direction == 1 ? -after : after) >= strict ? weight : 0;
          }
        }
      }
      const Scale scale = scale_of<S>(kScaled<S> ? largest_of(weights) : 0, 14);
      shared.weights[warp * kTiles + j][lane] = words_of(fragment_of<S, Fragment>(weights[0], scale.down));
      if (kScaled<S> && lane == 0) shared.weights_scale[warp * kTiles + j] = scale.up;
    };
#pragma unroll 1
    for (int j = direction == 1 ? warp + 1 : 0; j < (direction == 1 ? kTiles : warp); ++j) weigh_tile(j, std::false_type{});
    weigh_tile(warp, std::true_type{});
  }

  // Adds factor times `from` to y, with a factor for each row.
  __device__ static void add_rows(Accumulator& y, const Accumulator& from, float low, float high) {
#pragma unroll
    for (int k = 0; k < 8; ++k) y.value[k / 4][k % 4] += (k % 4 < 2 ? low : high) * from.value[k / 4][k % 4];
  }

  // Adds D x to a row of tiles.
  __device__ void skip(Accumulator& y, const Tile<kHeaddim>& x, int m, float D) const {
    const Fragment own = x.fragment(m * kTile, warp * kTile);
#pragma unroll
    for (int k = 0; k < 8; ++k) y.value[k / 4][k % 4] += D * unpack<S>(own.word[k / 2], k % 2);
  }

  // Writes what frames of a row of tiles are the sequence's. own: this lane's place in it.
  __device__ void write(const Accumulator& y, uint4* own, int chunk, int m) const {
    const Fragment rounded = fragment_of<S, Fragment>(y);
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
    if (int64_t(chunk) * kChunk + m * kTile + written_row() < length) *own = {word[0], word[1], word[2], word[3]};
  }
  __device__ int written_row() const { return lane / 4 + lane % 2 * 8; }
  __device__ uint4* written(int direction) const {
    void* row = at(a.y, direction, span.row, span.begin + written_row(), head);
    return held(static_cast<uint4*>(row) + warp * 2 + lane % 4 / 2);
  }
  __device__ int64_t written_step() const { return kTile * a.y.stride[2] / 8; }  // to the next row of tiles

  // Zeros behind the sequence, to the end of its row or up to the next one.
  __device__ void clear_padding(int direction) const {
    if (a.sequences.packed && sequence + 1 < a.sequences.count) return;
    constexpr int kPieces = Tile<kHeaddim>::kPieces;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < (a.sequences.frames - span.end) * kPieces; i += kThreads) {
      void* row = at(a.y, direction, span.row, span.end + i / kPieces, head);
      static_cast<uint4*>(row)[i % kPieces] = {0, 0, 0, 0};
    }
  }

  // One direction's part of a chunk's y: added to it if kAdded, and written to `own` if kWritten. The direction's state stays in
  // `state`, or where that is null is read from memory. fetch_next asks for what comes next and tells which; make_next,
  // of one warp, makes its steps.
  template <int direction, bool kAdded, bool kWritten, class FetchNext, class MakeNext>
  __device__ void outputs(Accumulator (*state)[kStateTiles], Accumulator (&y)[kTiles], uint4* own, float D, int chunk,
                          const Tile<kHeaddim>& x, int buffer, FetchNext fetch_next, MakeNext make_next) const {
    const Tile<N> B{shared.B[buffer]}, C{shared.C[buffer]};
    const Steps& now = shared.steps[buffer];
    wait_for_copies();
    __syncthreads();
    // The warp with the fewest weights makes the next steps.
    const bool makes_steps = warp == (direction == 1 ? kWarps - 1 : 0);
    fetch_next(makes_steps);
    weigh<direction>(B, C, now);
    if (makes_steps) make_next();

    RightFragment entering[kStateTiles];
    Scale scale;
    if (state) {
      scale = scale_of<S>(kScaled<S> ? largest_of(*state) : 0, 14);
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) entering[s] = fragment_of<S, RightFragment>((*state)[s], scale.down);
    } else {
      const uint4* from = stored_state(chunk);
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) entering[s] = fragment_of<RightFragment>(from[(warp * kStateTiles + s) * kWarp + lane]);
      if constexpr (kScaled<S>) scale.up = reinterpret_cast<const float*>(from + kStateWords<N> - 1)[warp];
    }
    // Scaled, sums leave no registers to keep columns in.
    RightFragment columns[kTiles];
    if constexpr (!kScaled<S>)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) columns[j] = columns_of(x, j);
    const auto column = [&](int j) {
      if constexpr (kScaled<S>) {
        return columns_of(x, j);
      } else {
        return columns[j];
      }
    };
    __syncthreads();  // all weights are there
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if constexpr (!kAdded) y[m] = {};
      Accumulator from = {};
#pragma unroll
      for (int s = 0; s < kStateTiles; ++s) multiply<S>(from, C.fragment(m * kTile, s * kTile), entering[s]);
      const float* u = &now.u[m * kTile + lane / 4];
      add_rows(y[m], from, exp2_of(u[0]) * scale.up, exp2_of(u[8]) * scale.up);
#pragma unroll(kScaled<S> ? 1 : kTiles)
      for (int j = direction == 1 ? m : 0; j < (direction == 1 ? kTiles : m + 1); ++j) {
        const Fragment weights = fragment_of<Fragment>(shared.weights[m * kTiles + j][lane]);
        if constexpr (kScaled<S>) {
          from = {};
          multiply<S>(from, weights, column(j));
          const float up = shared.weights_scale[m * kTiles + j];
          add_rows(y[m], from, up, up);
        } else {
          multiply<S>(y[m], weights, column(j));
        }
      }
      if constexpr (kWritten) {
        if (a.D.data) skip(y[m], x, m, D);
        write(y[m], own, chunk, m);
        own += written_step();
      }
    }
    if (state) advance(*state, column, B, now);
  }

  // y of one direction, which has x for itself.
  template <int direction>
  __device__ void sweep_direction() const {
    const S *x = own_x(direction), *B = own_B(direction), *C = own_C(direction);
    const float D = a.D.data ? *static_cast<const float*>(at(a.D, direction, head)) : 0;
    uint4* own = written(direction);
    float dt[2];
    Accumulator state[kStateTiles] = {}, y[kTiles];
    const auto fetch_chunk = [&](int buffer, int chunk, bool makes_steps) {
      fetch_x(buffer, x, chunk);
      fetch_B(buffer, B, chunk);
      fetch_C<direction>(buffer, C, chunk);
      if (makes_steps) read_dt<direction>(chunk, dt);
    };
    const auto chunk_of = [&](int i) { return direction == 1 ? chunks - 1 - i : i; };
    if (chunks > 0) {
      fetch_chunk(0, chunk_of(0), warp == 0);
      if (warp == 0) make_steps<direction>(chunk_of(0), dt, shared.steps[0]);
    }
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) {
      const int buffer = i % 2, chunk = chunk_of(i);
      outputs<direction, false, true>(
          &state, y, held(own + chunk * kTiles * written_step()), D, chunk, Tile<kHeaddim>{shared.x[buffer]}, buffer,
          [&](bool makes_steps) {
            if (i + 1 < chunks) fetch_chunk(1 - buffer, chunk_of(i + 1), makes_steps);
          },
          [&] {
            if (i + 1 < chunks) make_steps<direction>(chunk_of(i + 1), dt, shared.steps[1 - buffer]);
          });
    }
    clear_padding(direction);
  }

  // y of both directions, summed: of a chunk first the forward one's, in buffers 0, then the backward one's, in buffers 1.
  __device__ void sweep_both() const {
    const S *x = own_x(0), *B[2] = {own_B(0), own_B(1)}, *C[2] = {own_C(0), own_C(1)};
    float D = a.D.data ? *static_cast<const float*>(at(a.D, 0, head)) : 0;
    if (a.sum_D) D += *static_cast<const float*>(at(a.D, 1, head));
    uint4* own = written(0);
    float dt[2];
    Accumulator state[kStateTiles] = {}, y[kTiles];
    if (chunks > 0) {
      fetch_x(0, x, 0);
      fetch_B(0, B[0], 0);
      fetch_C<0>(0, C[0], 0);
      if (warp == 0) {
        read_dt<0>(0, dt);
        make_steps<0>(0, dt, shared.steps[0]);
      }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint4* own_rows = held(own + chunk * kTiles * written_step());
      const Tile<kHeaddim> tile{shared.x[chunk % 2]};
      outputs<0, false, false>(
          &state, y, own_rows, D, chunk, tile, 0,
          [&](bool makes_steps) {
            fetch_B(1, B[1], chunk);
            fetch_C<1>(1, C[1], chunk);
            if (makes_steps) read_dt<1>(chunk, dt);
          },
          [&] { make_steps<1>(chunk, dt, shared.steps[1]); });
      outputs<1, true, true>(
          nullptr, y, own_rows, D, chunk, tile, 1,
          [&](bool makes_steps) {
            if (chunk + 1 == chunks) return;
            fetch_x((chunk + 1) % 2, x, chunk + 1);
            fetch_B(0, B[0], chunk + 1);
            fetch_C<0>(0, C[0], chunk + 1);
            if (makes_steps) read_dt<0>(chunk + 1, dt);
          },
          [&] {
            if (chunk + 1 < chunks) make_steps<0>(chunk + 1, dt, shared.steps[0]);
          });
    }
    clear_padding(0);
  }
};

template <class S, int N, bool kSummed>
__global__ void __launch_bounds__(kThreads, 2) scan(const Arguments a) {
  constexpr int kWays = kSummed ? 1 : 2;
  const int64_t block = blockIdx.x;
  const Walk<S, N> walk(a, block % a.heads, block / a.heads / kWays);
  if constexpr (kSummed) {
    walk.sweep_states();
    walk.sweep_both();
  } else if (block / a.heads % kWays == 0) {
    walk.template sweep_direction<0>();
  } else {
    walk.template sweep_direction<1>();
  }
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
