// The selective scan on CUDA: chunks of steps in parallel, each as its recurrence.
//
// advance    each chunk from a state of zero: the state it ends with, and how much time it takes
// pass       from chunk to chunk: the state that enters each
// scan       each chunk again, from the state that enters it, with its outputs
//
// Backward: advance and pass again, then retreat and pass the same way against time for gradients of states, and differentiate.
// A row of no more frames than a chunk has is one chunk and needs no first two; its results are the same bits either way.
//
// A thread has kHeld entries of one channel's state, `team` neighbouring threads have the channel. A block's channels are of
// one group. Frames go by in tiles, staged in shared memory in the order of steps; steps that a tile does not have are of no
// time and add nothing, so that loops over a tile unroll.
#include <tuple>

#include "common/cuda.h"
#include "selective_scan/arguments.h"

namespace linconv {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp, kVector = 4;
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

struct Arguments {
  Sequences sequences;
  int64_t frames, channels, groups, dstate;
  int64_t group_blocks;  // blocks of a group's channels
  bool dt_softplus, reverse;
  View<4> x, dt, z, B, C;  // as arguments.h has them
  View<2> A;
  View<1> D, dt_bias;
  View<3> initial_states;
  Frames of_x, of_dt, of_z, of_B, of_C;
  Frames y;
  View<3> final_states;
  // For chunks between kernels, in the math type: (slots, channels, dstate) and (slots, channels). No states: one chunk.
  void *states, *time;
  // Backward
  Frames dy, dx, ddt, dz;
  View<3> dfinal_states, dinitial_states;
  void* dstates;              // as states: gradients
  void *dA, *dD, *ddt_bias;   // parts in the math type: (slots, channels, dstate), (slots, channels)
  void *dB, *dC;              // and (group_blocks, batch, L, groups, dstate)
};

// Threads of a channel, what each has of its state, frames of a tile and tiles of a chunk: as many as registers (a state for
// each frame of a tile) and shared memory (99 KB on sm_120) leave room for.
template <int Held, int Team, int Frames, int Tiles>
struct Shape {
  static constexpr int kHeld = Held, kTeam = Team, kFrames = Frames, kTiles = Tiles;
  static constexpr int kChannels = kThreads / Team, kStates = Held * Team, kChunk = Frames * Tiles;
};
template <class T>
constexpr bool kDouble = sizeof(T) == 8;
template <class T>
using Narrow = Shape<4, 4, kDouble<T> ? 8 : 16, 4>;  // dstate up to 16, as Mamba has it
template <class T>
using Middle = Shape<4, 16, kDouble<T> ? 8 : 16, 4>;  // up to 64
template <class T>
using Wide = Shape<8, 32, kDouble<T> ? 1 : 4, 8>;  // up to 256

// What a tile's frames hold, in shared memory.
template <class T, class Shape>
struct Tile {
  T dt[Shape::kFrames][Shape::kChannels], added[Shape::kFrames][Shape::kChannels];  // added: dt x
  T B[Shape::kFrames][Shape::kStates], C[Shape::kFrames][Shape::kStates];
  T y[Shape::kFrames][Shape::kChannels];
};
template <class T, class Shape>
struct GradientTile : Tile<T, Shape> {
  T x[Shape::kFrames][Shape::kChannels], slope[Shape::kFrames][Shape::kChannels];  // slope: d dt by what softplus is of
  T dy[Shape::kFrames][Shape::kChannels], gate[Shape::kFrames][Shape::kChannels];  // dy before the gate, dz over y
  T through_state[Shape::kFrames][Shape::kChannels], through_decay[Shape::kFrames][Shape::kChannels];
  T sums[kWarps][Shape::kFrames][2 * Shape::kStates];  // of dB and dC over a warp's channels
  T starts[Shape::kTiles][Shape::kHeld][kThreads];     // each thread's states before each tile
};

// A block's chunk and channels, and a thread's share.
template <class Shape>
struct Place {
  int64_t slot, sequence, chunk, group, block, first, channel;  // first: of the block's channels
  int channels;                                                 // that the block has
  Span span;
  int64_t begin;      // first step of the chunk
  int count;          // of its steps
  int held, local;    // first entry of the state, channel within the block
  bool last;          // whether the sequence ends with this chunk
  bool there, first_chunk;

  __device__ explicit Place(const Arguments& a) {
    slot = blockIdx.x;
    const SequenceChunk found = a.sequences.chunk_of_slot(slot, Shape::kChunk);
    sequence = found.sequence;
    chunk = found.chunk;
    span = a.sequences.sequence(sequence);
    const int64_t length = span.end - span.begin;
    begin = chunk * Shape::kChunk;
    count = static_cast<int>(length <= begin ? 0 : length - begin < Shape::kChunk ? length - begin : Shape::kChunk);
    first_chunk = chunk == 0;
    last = count > 0 ? begin + count == length : first_chunk;
    there = count > 0 || first_chunk;
    group = blockIdx.y / a.group_blocks;
    block = blockIdx.y % a.group_blocks;
    const int64_t group_channels = a.channels / a.groups;
    first = group * group_channels + block * Shape::kChannels;
    const int64_t left = group_channels - block * Shape::kChannels;
    channels = static_cast<int>(left < Shape::kChannels ? left : Shape::kChannels);
    local = threadIdx.x / Shape::kTeam;
    held = threadIdx.x % Shape::kTeam * Shape::kHeld;
    channel = first + local;
  }
  __device__ bool has_channel() const { return local < channels; }
  __device__ int64_t frame(const Arguments& a, int64_t step) const { return a.reverse ? span.end - 1 - step : span.begin + step; }

  // The frames of padding that are this block's to clear, [from, to): packed sequences leave none between them.
  __device__ void padding(const Arguments& a, int64_t& from, int64_t& to) const {
    from = to = 0;
    if (a.sequences.packed) {
      if (sequence + 1 == a.sequences.count && last) from = span.end, to = a.frames;
      return;
    }
    from = begin > span.end ? begin : span.end;
    to = begin + Shape::kChunk < a.frames ? begin + Shape::kChunk : a.frames;
  }
};

// Of a parameter or of states, which are in the math type.
template <class T, class... Index, int N>
__device__ __forceinline__ T element(const View<N>& view, Index... index) {
  return *static_cast<const T*>(at(view, index...));
}

// A thread's entries of (sequences, channels, dstate); zero where there are none.
template <class T, class Shape>
__device__ void load_states(const Arguments& a, const Place<Shape>& place, const View<3>& from, T (&out)[Shape::kHeld]) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i)
    out[i] = from.data && place.has_channel() && place.held + i < a.dstate
                 ? element<T>(from, place.sequence, place.channel, place.held + i)
                 : T(0);
}
template <class T, class Shape>
__device__ void store_states(const Arguments& a, const Place<Shape>& place, const View<3>& to, const T (&from)[Shape::kHeld]) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i)
    if (place.has_channel() && place.held + i < a.dstate)
      *static_cast<T*>(at(to, place.sequence, place.channel, place.held + i)) = from[i];
}

// The same of (slots, channels, dstate) in the math type.
template <class T, class Shape>
__device__ T* slot_states(const Arguments& a, const Place<Shape>& place, void* states) {
  return static_cast<T*>(states) + (place.slot * a.channels + place.channel) * a.dstate + place.held;
}
template <class T, class Shape>
__device__ void load_slot(const Arguments& a, const Place<Shape>& place, void* states, T (&out)[Shape::kHeld]) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i)
    out[i] = place.has_channel() && place.held + i < a.dstate ? slot_states<T>(a, place, states)[i] : T(0);
}
template <class T, class Shape>
__device__ void store_slot(const Arguments& a, const Place<Shape>& place, void* states, const T (&from)[Shape::kHeld]) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i)
    if (place.has_channel() && place.held + i < a.dstate) slot_states<T>(a, place, states)[i] = from[i];
}

// Rates in powers of two.
template <class T, class Shape>
__device__ void load_rates(const Arguments& a, const Place<Shape>& place, T (&out)[Shape::kHeld]) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i)
    out[i] = place.has_channel() && place.held + i < a.dstate ? element<T>(a.A, place.channel, place.held + i) * T(kLog2E) : T(0);
}

// Calls f(step within the tile, first channel or entry) for kVector of `width` columns of each of a tile's frames.
template <class Shape, class F>
__device__ __forceinline__ void each_vector(int width, F f) {
  const int vectors = width / kVector;
  for (int i = threadIdx.x; i < Shape::kFrames * vectors; i += kThreads) f(i / vectors, i % vectors * kVector);
}

// B or C of a tile.
template <class T, class S, class Shape>
__device__ __forceinline__ void stage_group(const Arguments& a, const Place<Shape>& place, const Frames& frames, int tile,
                                            T (&to)[Shape::kFrames][Shape::kStates]) {
  each_vector<Shape>(Shape::kStates, [&](int f, int n) {
    const int step = tile * Shape::kFrames + f;
    T values[kVector] = {};
    if (step < place.count)
      Column<T, S, kVector>(frames, place.group, place.span.row, n, present<kVector>(n, a.dstate))
          .read(place.frame(a, place.begin + step), values);
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[f][n + v] = values[v];
  });
}

template <class T, class S, class Shape>
__device__ __forceinline__ Column<T, S, kVector> column_of(const Frames& frames, const Place<Shape>& place, int c) {
  return Column<T, S, kVector>(frames, 0, place.span.row, place.first + c, present<kVector>(c, place.channels));
}

// x and dt of a tile. visit(f, c, x, dt before softplus) sees kVector channels of each frame, zeros where there are none.
template <class T, class S, class Shape, class Visit>
__device__ __forceinline__ void stage_inputs(const Arguments& a, const Place<Shape>& place, int tile, Tile<T, Shape>& to,
                                             Visit visit) {
  each_vector<Shape>(Shape::kChannels, [&](int f, int c) {
    const int step = tile * Shape::kFrames + f;
    T x[kVector] = {}, raw[kVector] = {}, dt[kVector] = {};
    if (step < place.count) {
      const int64_t t = place.frame(a, place.begin + step);
      column_of<T, S>(a.of_x, place, c).read(t, x);
      column_of<T, S>(a.of_dt, place, c).read(t, raw);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (c + v >= place.channels) continue;
        if (a.dt_bias.data) raw[v] += element<T>(a.dt_bias, place.first + c + v);
        dt[v] = a.dt_softplus ? softplus_of(raw[v]) : raw[v];
      }
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      to.dt[f][c + v] = dt[v];
      to.added[f][c + v] = dt[v] * x[v];
    }
    visit(f, c, x, raw);
  });
}
struct Nothing {
  template <class... Any>
  __device__ void operator()(const Any&...) const {}
};

// One step of a thread's entries.
template <class T, int Held>
__device__ __forceinline__ void step(T (&h)[Held], const T (&rates)[Held], T dt, T added, const T* B) {
#pragma unroll
  for (int i = 0; i < Held; ++i) h[i] = exp2_of(dt * rates[i]) * h[i] + added * B[i];
}

// Sums each of V values over Lanes threads that are Stride apart, half of the values going to half of the threads at each turn:
// thread i of the Lanes is left with the V / Lanes sums from i V / Lanes on, or, where values are fewer, with number
// i V / Lanes alone.
template <int V, int Lanes, int Stride, class T>
__device__ __forceinline__ void scatter_sums(T* values) {
  if constexpr (Lanes > 1) {
    constexpr int kMask = Stride * Lanes / 2;
    if constexpr (V > 1) {
      const bool upper = threadIdx.x & kMask;
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        const T kept = upper ? values[i + V / 2] : values[i], given = upper ? values[i] : values[i + V / 2];
        values[i] = kept + __shfl_xor_sync(0xffffffff, given, kMask);
      }
      scatter_sums<V / 2, Lanes / 2, Stride>(values);
    } else {
      values[0] += __shfl_xor_sync(0xffffffff, values[0], kMask);
      scatter_sums<V, Lanes / 2, Stride>(values);
    }
  }
}

// ---- Chunk to chunk ----

template <class T, class S, class Shape>
__global__ void __launch_bounds__(kThreads, 1) advance(const Arguments a) {
  const Place<Shape> place(a);
  if (place.count == 0) return;
  Tile<T, Shape>& tile = *shared_memory<Tile<T, Shape>>();
  T rates[Shape::kHeld], h[Shape::kHeld] = {}, time = 0;
  load_rates(a, place, rates);
  for (int i = 0; i < Shape::kTiles && i * Shape::kFrames < place.count; ++i) {
    __syncthreads();
    stage_inputs<T, S>(a, place, i, tile, Nothing());
    stage_group<T, S>(a, place, a.of_B, i, tile.B);
    __syncthreads();
#pragma unroll
    for (int f = 0; f < Shape::kFrames; ++f) {
      time += tile.dt[f][place.local];
      step(h, rates, tile.dt[f][place.local], tile.added[f][place.local], &tile.B[f][place.held]);
    }
  }
  store_slot(a, place, a.states, h);
  if (place.has_channel() && place.held == 0) static_cast<T*>(a.time)[place.slot * a.channels + place.channel] = time;
}

// In the place of what each chunk makes of zero, what enters it. Against time where `backward`.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) pass(const Arguments a, void* states, const View<3> start, bool backward, int chunk) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, sequence = blockIdx.y;
  if (index >= a.channels * a.dstate) return;
  const int64_t channel = index / a.dstate, n = index % a.dstate;
  const Span span = a.sequences.sequence(sequence);
  const int64_t chunks = ceil_div(span.end - span.begin, chunk), first = a.sequences.first_slot(sequence, chunk);
  const T rate = element<T>(a.A, channel, n) * T(kLog2E);
  T h = start.data ? element<T>(start, sequence, channel, n) : T(0);
  // Some chunks are read before any of them is written: one at a time, each would wait for its memory.
  constexpr int kAhead = 8;
  for (int64_t i = 0; i < chunks; i += kAhead) {
    T* own[kAhead];
    T made[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= chunks) continue;
      const int64_t slot = first + (backward ? chunks - 1 - i - k : i + k), at = slot * a.channels + channel;
      own[k] = static_cast<T*>(states) + at * a.dstate + n;
      made[k] = *own[k];
      decay[k] = exp2_of(rate * static_cast<const T*>(a.time)[at]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= chunks) continue;
      *own[k] = h;
      h = decay[k] * h + made[k];
    }
  }
}

// The state that enters a chunk, or its gradient from behind it.
template <class T, class Shape>
__device__ void entering(const Arguments& a, const Place<Shape>& place, void* states, const View<3>& start, T (&out)[Shape::kHeld]) {
  if (states && place.count > 0) load_slot(a, place, states, out);
  else load_states(a, place, start, out);
}

// ---- Forward ----

template <class T, class S, class Shape>
__global__ void __launch_bounds__(kThreads, 1) scan(const Arguments a) {
  const Place<Shape> place(a);
  int64_t from, to;
  place.padding(a, from, to);
  const int vectors = Shape::kChannels / kVector;
  for (int64_t t = from + threadIdx.x / vectors; t < to; t += kThreads / vectors)
    column_of<T, S>(a.y, place, threadIdx.x % vectors * kVector).clear(t);
  if (!place.there) return;
  Tile<T, Shape>& tile = *shared_memory<Tile<T, Shape>>();
  T rates[Shape::kHeld], h[Shape::kHeld];
  load_rates(a, place, rates);
  entering(a, place, a.states, a.initial_states, h);
  for (int i = 0; i < Shape::kTiles && i * Shape::kFrames < place.count; ++i) {
    __syncthreads();
    stage_inputs<T, S>(a, place, i, tile, Nothing());
    stage_group<T, S>(a, place, a.of_B, i, tile.B);
    stage_group<T, S>(a, place, a.of_C, i, tile.C);
    __syncthreads();
    T y[Shape::kFrames];
#pragma unroll
    for (int f = 0; f < Shape::kFrames; ++f) {
      step(h, rates, tile.dt[f][place.local], tile.added[f][place.local], &tile.B[f][place.held]);
      y[f] = 0;
#pragma unroll
      for (int n = 0; n < Shape::kHeld; ++n) y[f] += tile.C[f][place.held + n] * h[n];
    }
    scatter_sums<Shape::kFrames, Shape::kTeam, 1>(y);
    constexpr int kOwn = Shape::kFrames > Shape::kTeam ? Shape::kFrames / Shape::kTeam : 1;
    const int first = threadIdx.x % Shape::kTeam * Shape::kFrames / Shape::kTeam;
#pragma unroll
    for (int f = 0; f < kOwn; ++f) tile.y[first + f][place.local] = y[f];  // threads that share a frame write the same
    __syncthreads();
    each_vector<Shape>(Shape::kChannels, [&](int f, int c) {
      const int step = i * Shape::kFrames + f;
      if (step >= place.count) return;
      const int64_t t = place.frame(a, place.begin + step);
      T out[kVector], x[kVector], z[kVector];
      column_of<T, S>(a.of_x, place, c).read(t, x);
      if (a.z.data) column_of<T, S>(a.of_z, place, c).read(t, z);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const bool there = c + v < place.channels;
        out[v] = tile.y[f][c + v] + (a.D.data && there ? element<T>(a.D, place.first + c + v) * x[v] : T(0));
        if (a.z.data && there) out[v] *= z[v] * sigmoid_of(z[v]);
      }
      column_of<T, S>(a.y, place, c).write(t, out);
    });
  }
  if (place.last) store_states(a, place, a.final_states, h);
}

// ---- Backward ----

// dy before the gate, and what dz is of y.
template <class T, class S, class Shape>
__device__ __forceinline__ void gradient_of_gate(const Arguments& a, const Place<Shape>& place, int64_t t, int c, T (&dy)[kVector],
                                                 T (&gate)[kVector]) {
  column_of<T, S>(a.dy, place, c).read(t, dy);
  if (!a.z.data) return;
  T z[kVector];
  column_of<T, S>(a.of_z, place, c).read(t, z);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const T s = sigmoid_of(z[v]);
    gate[v] = dy[v] * (s + z[v] * s * (T(1) - s));
    dy[v] *= z[v] * s;
  }
}

template <class T, class S, class Shape>
__global__ void __launch_bounds__(kThreads, 1) retreat(const Arguments a) {
  const Place<Shape> place(a);
  if (place.count == 0) return;
  Tile<T, Shape>& tile = *shared_memory<Tile<T, Shape>>();
  T rates[Shape::kHeld], g[Shape::kHeld] = {};
  load_rates(a, place, rates);
  for (int i = Shape::kTiles - 1; i >= 0; --i) {
    if (i * Shape::kFrames >= place.count) continue;
    __syncthreads();
    stage_inputs<T, S>(a, place, i, tile, Nothing());
    stage_group<T, S>(a, place, a.of_C, i, tile.C);
    each_vector<Shape>(Shape::kChannels, [&](int f, int c) {
      const int step = i * Shape::kFrames + f;
      T dy[kVector] = {}, gate[kVector] = {};
      if (step < place.count) gradient_of_gate<T, S>(a, place, place.frame(a, place.begin + step), c, dy, gate);
#pragma unroll
      for (int v = 0; v < kVector; ++v) tile.y[f][c + v] = dy[v];
    });
    __syncthreads();
#pragma unroll
    for (int f = Shape::kFrames - 1; f >= 0; --f)
#pragma unroll
      for (int n = 0; n < Shape::kHeld; ++n)
        g[n] = exp2_of(tile.dt[f][place.local] * rates[n]) * (g[n] + tile.C[f][place.held + n] * tile.y[f][place.local]);
  }
  store_slot(a, place, a.dstates, g);
}

template <class T, class Shape>
__device__ T* of_frame(const Arguments& a, const Place<Shape>& place, void* parts, int64_t t) {
  const int64_t batch = a.B.size[1];
  return static_cast<T*>(parts) + (((place.block * batch + place.span.row) * a.frames + t) * a.groups + place.group) * a.dstate;
}

template <class T, class S, class Shape>
__global__ void __launch_bounds__(kThreads, 1) differentiate(const Arguments a) {
  constexpr int kFrames = Shape::kFrames, kHeld = Shape::kHeld;
  const Place<Shape> place(a);
  int64_t from, to;
  place.padding(a, from, to);
  const int vectors = Shape::kChannels / kVector;
  for (int64_t t = from + threadIdx.x / vectors; t < to; t += kThreads / vectors) {
    const int c = threadIdx.x % vectors * kVector;
    column_of<T, S>(a.dx, place, c).clear(t);
    column_of<T, S>(a.ddt, place, c).clear(t);
    if (a.z.data) column_of<T, S>(a.dz, place, c).clear(t);
  }
  for (int64_t t = from; t < to; ++t)
    for (int64_t n = threadIdx.x; n < a.dstate; n += kThreads) of_frame<T>(a, place, a.dB, t)[n] = of_frame<T>(a, place, a.dC, t)[n] = 0;

  GradientTile<T, Shape>& tile = *shared_memory<GradientTile<T, Shape>>();
  T rates[kHeld], h[kHeld], g[kHeld], dA[kHeld] = {};
  load_rates(a, place, rates);
  entering(a, place, a.states, a.initial_states, h);
  entering(a, place, a.dstates, a.dfinal_states, g);
  for (int i = 0; i < Shape::kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) tile.starts[i][n][threadIdx.x] = h[n];
    if ((i + 1) * kFrames >= place.count) continue;
    __syncthreads();
    stage_inputs<T, S>(a, place, i, tile, Nothing());
    stage_group<T, S>(a, place, a.of_B, i, tile.B);
    __syncthreads();
#pragma unroll
    for (int f = 0; f < kFrames; ++f)
      step(h, rates, tile.dt[f][place.local], tile.added[f][place.local], &tile.B[f][place.held]);
  }
  T dskip = 0, dbias = 0;  // of channel threadIdx.x
  const bool sums_channel = static_cast<int>(threadIdx.x) < place.channels;
  for (int i = Shape::kTiles - 1; i >= 0; --i) {
    if (i * kFrames >= place.count) continue;
    __syncthreads();
    stage_inputs<T, S>(a, place, i, tile, [&](int f, int c, const T (&x)[kVector], const T (&raw)[kVector]) {
      const int step = i * kFrames + f;
      T dy[kVector] = {}, gate[kVector] = {};
      if (step < place.count) gradient_of_gate<T, S>(a, place, place.frame(a, place.begin + step), c, dy, gate);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        tile.x[f][c + v] = x[v];
        tile.slope[f][c + v] = a.dt_softplus ? sigmoid_of(raw[v]) : T(1);
        tile.dy[f][c + v] = dy[v];
        tile.gate[f][c + v] = gate[v];
      }
    });
    stage_group<T, S>(a, place, a.of_B, i, tile.B);
    stage_group<T, S>(a, place, a.of_C, i, tile.C);
    __syncthreads();
    T before[kFrames][kHeld];
#pragma unroll
    for (int n = 0; n < kHeld; ++n) h[n] = tile.starts[i][n][threadIdx.x];
#pragma unroll
    for (int f = 0; f < kFrames; ++f) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) before[f][n] = h[n];
      step(h, rates, tile.dt[f][place.local], tile.added[f][place.local], &tile.B[f][place.held]);
    }
#pragma unroll
    for (int f = kFrames - 1; f >= 0; --f) {
      const T dt = tile.dt[f][place.local], added = tile.added[f][place.local], dy = tile.dy[f][place.local];
      T of_BC[2 * kHeld], through[4] = {};  // of the state, of the decay, y
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        const T B = tile.B[f][place.held + n], C = tile.C[f][place.held + n];
        const T decay = exp2_of(dt * rates[n]), kept = decay * before[f][n], now = kept + added * B;
        g[n] += C * dy;
        of_BC[n] = g[n] * added;
        of_BC[kHeld + n] = dy * now;
        const T of_exponent = g[n] * kept;
        through[0] += g[n] * B;
        through[1] += of_exponent * rates[n];
        through[2] += C * now;
        dA[n] += of_exponent * dt;
        g[n] *= decay;
      }
      scatter_sums<4, Shape::kTeam, 1>(through);
      const int which = threadIdx.x % Shape::kTeam * 4 / Shape::kTeam;  // threads that share one write the same
      if (which == 0) tile.through_state[f][place.local] = through[0];
      if (which == 1) tile.through_decay[f][place.local] = through[0];
      if (which == 2) tile.y[f][place.local] = through[0];
      constexpr int kLanes = kWarp / Shape::kTeam;  // channels of a warp
      scatter_sums<2 * kHeld, kLanes, Shape::kTeam>(of_BC);
      constexpr int kOwn = 2 * kHeld > kLanes ? 2 * kHeld / kLanes : 1;
      const int first = threadIdx.x % kWarp / Shape::kTeam * 2 * kHeld / kLanes;
      T* sums = tile.sums[threadIdx.x / kWarp][f];  // (dB or dC, dstate)
#pragma unroll
      for (int k = 0; k < kOwn; ++k)
        sums[(first + k) / kHeld * Shape::kStates + place.held + (first + k) % kHeld] = of_BC[k];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < kFrames * 2 * Shape::kStates; k += kThreads) {
      const int f = k / (2 * Shape::kStates), column = k % (2 * Shape::kStates), n = column % Shape::kStates;
      if (i * kFrames + f >= place.count || n >= a.dstate) continue;
      T sum = tile.sums[0][f][column];
      for (int w = 1; w < kWarps; ++w) sum += tile.sums[w][f][column];
      of_frame<T>(a, place, column < Shape::kStates ? a.dB : a.dC, place.frame(a, place.begin + i * kFrames + f))[n] = sum;
    }
    each_vector<Shape>(Shape::kChannels, [&](int f, int c) {
      const bool there = i * kFrames + f < place.count;
      T dx[kVector] = {}, ddt[kVector] = {}, dz[kVector] = {};
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (!there || c + v >= place.channels) continue;
        const T skip = a.D.data ? element<T>(a.D, place.first + c + v) : T(0);
        dx[v] = skip * tile.dy[f][c + v] + tile.dt[f][c + v] * tile.through_state[f][c + v];
        ddt[v] = tile.slope[f][c + v] *
                 (tile.through_state[f][c + v] * tile.x[f][c + v] + tile.through_decay[f][c + v] * T(kLn2));
        dz[v] = tile.gate[f][c + v] * (tile.y[f][c + v] + skip * tile.x[f][c + v]);
      }
      // Only the thread that has these channels reads them so far: the sums over steps come behind the barrier.
#pragma unroll
      for (int v = 0; v < kVector; ++v) tile.slope[f][c + v] = ddt[v];
      if (!there) return;
      const int64_t t = place.frame(a, place.begin + i * kFrames + f);
      column_of<T, S>(a.dx, place, c).write(t, dx);
      column_of<T, S>(a.ddt, place, c).write(t, ddt);
      if (a.z.data) column_of<T, S>(a.dz, place, c).write(t, dz);
    });
    __syncthreads();
    if (sums_channel)
      for (int f = 0; f < kFrames; ++f) {
        dskip += tile.dy[f][threadIdx.x] * tile.x[f][threadIdx.x];
        dbias += tile.slope[f][threadIdx.x];
      }
  }
  store_slot(a, place, a.dA, dA);
  if (sums_channel) {
    const int64_t at = place.slot * a.channels + place.first + threadIdx.x;
    if (a.dD) static_cast<T*>(a.dD)[at] = dskip;
    if (a.ddt_bias) static_cast<T*>(a.ddt_bias)[at] = dbias;
  }
  if (place.first_chunk && a.dinitial_states.data) store_states(a, place, a.dinitial_states, g);
}

struct Parts {
  const void* parts;  // (count, columns) in the math type
  int64_t count, columns;
  void* out;
  DType dtype;
};
template <class T>
__global__ void __launch_bounds__(kWarp* kSumRows) reduce(const Parts p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const T sum = sum_of_parts(static_cast<const T*>(p.parts), p.count, p.columns, column);
  if (threadIdx.x < kWarp && column < p.columns) store_element<Tagged>(p.out, p.dtype, column, sum);
}

// ---- Launching ----

using Optional = const std::optional<Tensor>&;

struct Call {
  Arguments a;
  int64_t batch, sequences, slots;  // slots: of chunks, known with their size
  DType math;
  bool one_dtype;  // of everything that kernels read or write by frames

  Call(const SelectiveScanTensors& tensors, bool dt_softplus, Optional seq_lens, Optional cu_seqlens, bool reverse) : a{} {
    set_tensors(a, tensors);
    batch = a.x.size[1];
    math = math_type(a.x.dtype);
    a.sequences = sequences_of(seq_lens, cu_seqlens, batch, a.frames);
    sequences = a.sequences.count;
    a.dt_softplus = dt_softplus;
    a.reverse = reverse;
    a.initial_states = states_view(tensors.initial_states, sequences, a.channels, a.dstate, math, "initial_states");
    a.of_x = frames_of(a.x);
    a.of_dt = frames_of(a.dt);
    a.of_B = frames_of(a.B);
    a.of_C = frames_of(a.C);
    if (tensors.z) a.of_z = frames_of(a.z);
    one_dtype = true;
    for (const DType dtype : {a.dt.dtype, a.B.dtype, a.C.dtype, tensors.z ? a.z.dtype : a.x.dtype})
      one_dtype = one_dtype && dtype == a.x.dtype;
  }

  // Calls f(T, S, shape): the storage types and the states that models use have kernels of their own.
  template <class F>
  void with_types(F f) {
    if (math == DType::kFloat64) return with_shape(double{}, f);
    const bool narrow = a.dstate <= 16 && one_dtype;
    if (narrow && a.x.dtype == DType::kFloat32) return f(float{}, float{}, Narrow<float>{});
    if (narrow && a.x.dtype == DType::kBFloat16) return f(float{}, BFloat16{}, Narrow<float>{});
    if (narrow && a.x.dtype == DType::kFloat16) return f(float{}, Float16{}, Narrow<float>{});
    with_shape(float{}, f);
  }
  template <class T, class F>
  void with_shape(T math, F f) {
    if (a.dstate <= 16) return f(math, Tagged{}, Narrow<T>{});
    if (a.dstate <= 64) return f(math, Tagged{}, Middle<T>{});
    f(math, Tagged{}, Wide<T>{});
  }
  template <class Shape>
  dim3 grid() {
    slots = a.sequences.slots(Shape::kChunk);
    a.group_blocks = ceil_div(a.channels / a.groups, Shape::kChannels);
    return {grid_dim(slots, kGridX, "chunks"), grid_dim(a.group_blocks * a.groups, kGridY, "channels")};
  }
  dim3 pass_grid() const {
    return {grid_dim(ceil_div(a.channels * a.dstate, kThreads), kGridX, "states"), grid_dim(sequences, kGridY, "sequences")};
  }
};

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                          const Tensor& C, Optional D, Optional z, Optional dt_bias, bool dt_softplus,
                                          Optional initial_states, Optional seq_lens, Optional cu_seqlens, bool reverse) {
  const Launcher launch(x);
  Call call({x, dt, A, B, C, D, z, dt_bias, initial_states}, dt_softplus, seq_lens, cu_seqlens, reverse);
  Arguments& a = call.a;
  Tensor y = empty_as(x, a.x.dtype), final_states = empty({call.sequences, a.channels, a.dstate}, call.math);
  a.y = frames_of(frames_view(y, "y"));
  a.final_states = view<3>(final_states, "final_states");
  if (call.sequences == 0) torch::stable::zero_(y);  // no block has it
  if (a.frames == 0) {  // states stay what they are
    if (initial_states) torch::stable::copy_(final_states, *initial_states);
    else torch::stable::zero_(final_states);
    return {y, final_states};
  }
  call.with_types([&](auto math, auto storage, auto shape) {
    using T = decltype(math);
    using S = decltype(storage);
    using Shape = decltype(shape);
    const dim3 grid = call.grid<Shape>();
    constexpr int64_t kBytes = sizeof(Tile<T, Shape>);
    const int64_t between = a.frames > Shape::kChunk ? call.slots : 0;
    Tensor states = empty({between, a.channels, a.dstate}, call.math), time = empty({between, a.channels}, call.math);
    if (between) {
      a.states = states.data_ptr();
      a.time = time.data_ptr();
      launch(advance<T, S, Shape>, grid, kThreads, kBytes, a);
      launch(pass<T>, call.pass_grid(), kThreads, 0, a, a.states, a.initial_states, false, int(Shape::kChunk));
    }
    launch(scan<T, S, Shape>, grid, kThreads, kBytes, a);
  });
  return {y, final_states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(const Tensor& dy, Optional dfinal_states, const Tensor& x, const Tensor& dt, const Tensor& A,
                                  const Tensor& B, const Tensor& C, Optional D, Optional z, Optional dt_bias,
                                  bool dt_softplus, Optional initial_states, Optional seq_lens, Optional cu_seqlens,
                                  bool reverse) {
  const Launcher launch(x);
  Call call({x, dt, A, B, C, D, z, dt_bias, initial_states}, dt_softplus, seq_lens, cu_seqlens, reverse);
  Arguments& a = call.a;
  const DType math = call.math;
  const View<4> dy_view = frames_view(dy, "dy");
  require_sizes(dy_view, {1, call.batch, a.frames, a.channels}, "dy");
  a.dy = frames_of(dy_view);
  call.one_dtype = call.one_dtype && dy_view.dtype == a.x.dtype;
  a.dfinal_states = states_view(dfinal_states, call.sequences, a.channels, a.dstate, math, "dfinal_states");
  const std::initializer_list<int64_t> none{0};
  Tensor dx = empty_as(x, a.x.dtype), ddt = empty_as(dt, a.dt.dtype), dz = z ? empty_as(*z, a.z.dtype) : empty(none, math);
  Tensor dinitial = initial_states ? empty_as(*initial_states, a.initial_states.dtype) : empty(none, math);
  a.dx = frames_of(frames_view(dx, "dx"));
  a.ddt = frames_of(frames_view(ddt, "ddt"));
  if (z) a.dz = frames_of(frames_view(dz, "dz"));
  if (initial_states) a.dinitial_states = view<3>(dinitial, "dinitial_states");
  if (a.frames == 0 && initial_states) {
    if (dfinal_states) torch::stable::copy_(dinitial, *dfinal_states);
    else torch::stable::zero_(dinitial);
  }
  if (call.sequences == 0) {  // no block has them
    torch::stable::zero_(dx), torch::stable::zero_(ddt);
    if (z) torch::stable::zero_(dz);
  }
  std::optional<Tensor> dA, dB, dC, dD, ddt_bias;
  call.with_types([&](auto math_value, auto storage, auto shape) {
    using T = decltype(math_value);
    using S = decltype(storage);
    using Shape = decltype(shape);
    const dim3 grid = call.grid<Shape>();
    const int64_t between = a.frames > Shape::kChunk ? call.slots : 0;
    Tensor states = empty({between, a.channels, a.dstate}, math), dstates = empty({between, a.channels, a.dstate}, math);
    Tensor time = empty({between, a.channels}, math);
    dA = empty({call.slots, a.channels, a.dstate}, math);
    dD = empty({call.slots, a.channels}, math);
    ddt_bias = empty({call.slots, a.channels}, math);
    a.dA = dA->data_ptr();
    a.dD = dD->data_ptr();
    a.ddt_bias = ddt_bias->data_ptr();
    dB = empty({a.group_blocks, call.batch, a.frames, a.groups, a.dstate}, math);
    dC = empty({a.group_blocks, call.batch, a.frames, a.groups, a.dstate}, math);
    if (call.sequences == 0) torch::stable::zero_(*dB), torch::stable::zero_(*dC);
    a.dB = dB->data_ptr();
    a.dC = dC->data_ptr();
    constexpr int64_t kBytes = sizeof(Tile<T, Shape>);
    if (between) {
      a.states = states.data_ptr();
      a.dstates = dstates.data_ptr();
      a.time = time.data_ptr();
      launch(advance<T, S, Shape>, grid, kThreads, kBytes, a);
      launch(pass<T>, call.pass_grid(), kThreads, 0, a, a.states, a.initial_states, false, int(Shape::kChunk));
      launch(retreat<T, S, Shape>, grid, kThreads, kBytes, a);
      launch(pass<T>, call.pass_grid(), kThreads, 0, a, a.dstates, a.dfinal_states, true, int(Shape::kChunk));
    }
    launch(differentiate<T, S, Shape>, grid, kThreads, sizeof(GradientTile<T, Shape>), a);
  });
  const auto sum = [&](const Tensor& parts, int64_t count, const Tensor& like, const char* name) {
    Tensor out = empty_as(like, dtype_of(like, name));
    const Parts p{parts.data_ptr(), count, like.numel(), out.data_ptr(), dtype_of(like, name)};
    const dim3 grid(grid_dim(ceil_div(like.numel(), kWarp), kGridX, name));
    const int64_t bytes = kWarp * kSumRows * element_size(math);
    if (math == DType::kFloat64) launch(reduce<double>, grid, kWarp * kSumRows, bytes, p);
    else launch(reduce<float>, grid, kWarp * kSumRows, bytes, p);
    return out;
  };
  return {dx,
          ddt,
          sum(*dA, call.slots, A, "A"),
          sum(*dB, a.group_blocks, B, "B"),
          sum(*dC, a.group_blocks, C, "C"),
          D ? sum(*dD, call.slots, *D, "D") : empty(none, math),
          dz,
          dt_bias ? sum(*ddt_bias, call.slots, *dt_bias, "dt_bias") : empty(none, math),
          dinitial};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&linconv::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&linconv::selective_scan_backward));
}
