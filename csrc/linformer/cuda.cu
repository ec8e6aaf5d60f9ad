// Linformer attention on CUDA cores.
//
// Every product here is sums(m, n) += sum over k of left(k, m) right(k, n). A block of kSide x kSide threads holds a tile of
// sums in registers, M x N a thread, and takes kDepth of k at a time through shared memory, whatever the strides and the
// storage type; an operand that the block itself has computed is read from shared memory where it lies. A thread adds in
// the order of k, which nothing but the product decides.
//
// Attention holds the scores of a tile of queries over all r keys in shared memory: the softmax sees them whole, and keys
// and values pass once. Sums over frames are cut into the splits of kernel.h and added in their order. No atomics.
#include <algorithm>
#include <tuple>

#include "common/cuda.h"
#include "linformer/arguments.h"
#include "linformer/kernel.h"

namespace linconv {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kSide = 16, kThreads = kSide * kSide;
constexpr int kPad = 4;  // elements behind a row of shared memory
constexpr int kColumns = 4 * kSide;  // of headdim, and of ranks, that a tile has unless it says otherwise
template <class T>
constexpr int kDepth = 128 / sizeof(T);
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;  // on a multiprocessor at least, which bounds the registers

// ---- Products ----

// Values that a thread reads and writes at once.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Run {
  T item[N];
};
template <int N>
constexpr int kRun = N < 4 ? N : 4;

// Where a thread's i-th of N values stands on the side of a tile: in runs, so that neighbours read neighbouring ones.
template <int N>
__device__ __forceinline__ int position(int thread, int i) {
  return i / kRun<N> * kSide * kRun<N> + thread * kRun<N> + i % kRun<N>;
}

template <class T, int N>
__device__ __forceinline__ void read_runs(const T* row, int thread, T (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += kRun<N>) {
    const auto run = *reinterpret_cast<const Run<T, kRun<N>>*>(row + position<N>(thread, i));
#pragma unroll
    for (int j = 0; j < kRun<N>; ++j) out[i + j] = run.item[j];
  }
}

// Calls f with Type<S>{} for the storage types S that go with the math type.
template <class T, class F>
__device__ __forceinline__ void with_storage_of(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(Type<double>{});
  } else if (dtype == DType::kFloat32) {
    f(Type<float>{});
  } else if (dtype == DType::kBFloat16) {
    f(Type<BFloat16>{});
  } else {
    f(Type<Float16>{});
  }
}

// A matrix (depth, side) in memory.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t depth, side;  // strides
};
// The last two dimensions of a view, from `start` on, with the last but one, or the last, as the depth.
template <int N>
__device__ __forceinline__ Matrix row_by_row(const View<N>& view, const void* start) {
  return {start, view.dtype, view.stride[N - 2], view.stride[N - 1]};
}
template <int N>
__device__ __forceinline__ Matrix column_by_column(const View<N>& view, const void* start) {
  return {start, view.dtype, view.stride[N - 1], view.stride[N - 2]};
}

// An operand that passes through shared memory: kSide * N of its side, of which `there` exist; the others are zeros.
// kAlongDepth tells which way neighbouring threads read.
template <class T, int N, bool kAlongDepth>
struct Streamed {
  static constexpr int kSize = kSide * N, kRow = kSize + kPad, kElements = kDepth<T> * kRow;

  Matrix from;
  int64_t there;
  T* stage;  // kElements
  T factor = 1;

  __device__ static constexpr int row() { return kRow; }

  __device__ __forceinline__ const T* rows(int64_t first, int count) const {
    constexpr int kSteps = kDepth<T> * kSize / kThreads;
    // A thread's elements lie kJump apart, of the side or of the depth. Along the depth, a warp takes 8 of it by 4 of the
    // side, which are 32 banks of shared memory.
    constexpr int kPieces = kDepth<T> / 8, kJump = kAlongDepth ? kThreads / kWarp / kPieces * 4 : kThreads / kSize;
    static_assert(kSteps * kThreads == kDepth<T> * kSize && kThreads / kWarp % kPieces == 0 && kThreads % kSize == 0);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int depth = kAlongDepth ? warp % kPieces * 8 + lane % 8 : threadIdx.x / kSize;
    const int side = kAlongDepth ? warp / kPieces * 4 + lane / 8 : threadIdx.x % kSize;
    const int inside = there < kSize ? static_cast<int>(there) : kSize;
    T* to = stage + depth * kRow + side;
    with_storage_of<T>(from.dtype, [&](auto storage) {
      using S = typename decltype(storage)::type;
      const S* element = static_cast<const S*>(from.data) + (first + depth) * from.depth + side * from.side;
      const int64_t jump = kJump * (kAlongDepth ? from.side : from.depth);
      S held[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step, element += jump) {
        const bool present = kAlongDepth ? depth < count && side + step * kJump < inside : depth + step * kJump < count && side < inside;
        held[step] = present ? *element : S{};
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) to[step * kJump * (kAlongDepth ? 1 : kRow)] = factor * to_math<T>(held[step]);
    });
    return stage;
  }
};

// An operand that lies in shared memory, whole.
template <class T>
struct Resident {
  const T* data;
  int row_;

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ const T* rows(int64_t first, int) const { return data + first * row_; }
};

// Every thread of the block calls it. What the block wrote to shared memory before is seen.
template <int M, int N, class T, class Left, class Right>
__device__ __forceinline__ void accumulate(const Left& left, const Right& right, int64_t depth, T (&sums)[M][N]) {
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  for (int64_t first = 0; first < depth; first += kDepth<T>) {
    const int count = static_cast<int>(depth - first < kDepth<T> ? depth - first : kDepth<T>);
    __syncthreads();  // what the stages held before is read
    const T *left_rows = left.rows(first, count), *right_rows = right.rows(first, count);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      T a[M], b[N];
      read_runs(left_rows + k * left.row(), y, a);
      read_runs(right_rows + k * right.row(), x, b);
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) sums[i][j] += a[i] * b[j];
    }
  }
}

// Calls f(m, n, sum) for each of a thread's sums, with its place in the tile.
template <int M, int N, class T, class F>
__device__ __forceinline__ void each(T (&sums)[M][N], F&& f) {
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) f(position<M>(y, i), position<N>(x, j), sums[i][j]);
}

// ---- Where a block is ----

__device__ __forceinline__ int64_t take(int64_t& index, int64_t size) {  // the fastest of the dimensions left in index
  const int64_t out = index % size;
  index /= size;
  return out;
}
__device__ __forceinline__ int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }

// The frames of one split of a sequence; none where it has fewer splits.
struct Split {
  int64_t begin, end;

  __device__ Split(int64_t length, int64_t split) {
    const int64_t frames = linformer_split_frames(length);
    begin = split * frames;
    end = at_most(length, begin + frames);
  }
  __device__ bool absent() const { return begin > 0 && begin >= end; }  // an empty sequence has one split, of zeros
};

// What is summed over splits: results where no sequence of the batch is cut, else parts (…, splits, size).
struct Summed {
  void* data;
  DType dtype;
};

// ---- Projection ----

struct ProjectArguments {
  View<4> x;     // (batch, heads, L, headdim)
  View<3> proj;  // (1 or heads, Lmax, r)
  int64_t batch, heads, frames, headdim, rank;
  bool normalize;  // divide by the root of the sequence's length
  Sequences sequences;
  int64_t splits;
  Summed to;  // (batch, heads, splits, r, headdim)

  View<4> grad;    // (batch, heads, r, headdim); backward only, as is all that follows
  View<4> dx;      // as x
  int64_t shares;  // that the sum over rows and heads is cut into
  Summed dproj;    // (1 or heads, shares, Lmax, r)
};

template <class T>
__device__ T length_factor(int64_t length, bool normalize) {
  return normalize && length > 0 ? inverse_root(static_cast<T>(length)) : T(1);
}

__device__ __forceinline__ int64_t head_of_proj(const ProjectArguments& a, int64_t head) { return a.proj.size[0] == 1 ? 0 : head; }

// proj^T x over one split: a tile of ranks and columns.
template <class T, int M>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) project(const ProjectArguments a) {
  int64_t index = blockIdx.x;
  const int64_t column = take(index, ceil_div(a.headdim, kColumns)) * kColumns;
  const int64_t rank = take(index, ceil_div(a.rank, kSide * M)) * (kSide * M);
  const int64_t head = take(index, a.heads), split = take(index, a.splits), row = index;
  const int64_t length = a.sequences.sequence(row).end;
  const Split frames(length, split);
  if (frames.absent()) return;
  T* stages = shared_memory<T>();
  using Left = Streamed<T, M, false>;
  const Left proj{row_by_row(a.proj, at(a.proj, head_of_proj(a, head), frames.begin, rank)), a.rank - rank, stages};
  const Streamed<T, 4, false> x{row_by_row(a.x, at(a.x, row, head, frames.begin, column)), a.headdim - column,
                                stages + Left::kElements};
  T sums[M][4] = {};
  accumulate(proj, x, frames.end - frames.begin, sums);
  const T factor = a.splits == 1 ? length_factor<T>(length, a.normalize) : T(1);
  const int64_t to = ((row * a.heads + head) * a.splits + split) * a.rank;
  each(sums, [&](int r, int c, T sum) {
    if (rank + r < a.rank && column + c < a.headdim)
      store_element<Tagged>(a.to.data, a.to.dtype, (to + rank + r) * a.headdim + column + c, sum * factor);
  });
}

// dx = proj grad: a tile of frames and columns.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) unproject(const ProjectArguments a) {
  constexpr int M = 8, kFrames = kSide * M;
  int64_t index = blockIdx.x;
  const int64_t column = take(index, ceil_div(a.headdim, kColumns)) * kColumns;
  const int64_t first = take(index, ceil_div(a.frames, kFrames)) * kFrames;
  const int64_t head = take(index, a.heads), row = index, length = a.sequences.sequence(row).end;
  T* stages = shared_memory<T>();
  using Left = Streamed<T, M, true>;
  const Left proj{column_by_column(a.proj, at(a.proj, head_of_proj(a, head), first)), length - first, stages};
  const Streamed<T, 4, false> grad{row_by_row(a.grad, at(a.grad, row, head, int64_t(0), column)), a.headdim - column,
                                   stages + Left::kElements, length_factor<T>(length, a.normalize)};
  T sums[M][4] = {};
  if (first < length) accumulate(proj, grad, a.rank, sums);
  each(sums, [&](int t, int c, T sum) {
    if (first + t < a.frames && column + c < a.headdim)
      store_element<Tagged>(at(a.dx, row, head, first + t, column + c), a.dx.dtype, 0, first + t < length ? sum : T(0));
  });
}

// dproj = the sum over rows, and heads that share it, of x grad^T: one share of them, for a tile of frames and ranks.
constexpr int kWeightFrames = 8 * kSide;
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) project_weights(const ProjectArguments a) {
  int64_t index = blockIdx.x;
  const int64_t rank = take(index, ceil_div(a.rank, kColumns)) * kColumns, most = a.proj.size[1];
  const int64_t first = take(index, ceil_div(most, kWeightFrames)) * kWeightFrames;
  const int64_t share = take(index, a.shares), own = index;
  const int64_t together = a.proj.size[0] == 1 ? a.heads : 1, items = a.batch * together, size = ceil_div(items, a.shares);
  T* stages = shared_memory<T>();
  using Left = Streamed<T, 8, true>;
  T sums[8][4] = {};
  for (int64_t item = share * size; item < at_most(items, (share + 1) * size); ++item) {
    const int64_t row = item / together, head = own + item % together, length = a.sequences.sequence(row).end;
    if (length <= first) continue;
    const Left x{column_by_column(a.x, at(a.x, row, head, first)), length - first, stages};
    const Streamed<T, 4, true> grad{column_by_column(a.grad, at(a.grad, row, head, rank)), a.rank - rank,
                                    stages + Left::kElements, length_factor<T>(length, a.normalize)};
    accumulate(x, grad, a.headdim, sums);
  }
  each(sums, [&](int t, int r, T sum) {
    if (first + t < most && rank + r < a.rank)
      store_element<Tagged>(a.dproj.data, a.dproj.dtype, ((own * a.shares + share) * most + first + t) * a.rank + rank + r, sum);
  });
}

// ---- Attention ----

struct AttendArguments {
  View<4> q;     // (batch, heads, L, headdim)
  View<4> k, v;  // (batch, heads, r, headdim)
  int64_t batch, heads, frames, headdim, rank;
  double scale;
  Dropout dropout;
  const int64_t* seed;  // where there is dropout
  Sequences sequences;
  View<4> out;  // as q

  int64_t splits;  // backward only, as is all that follows
  View<4> grad, dq;  // as q
  void* statistics;  // (3, batch, heads, L) in the math type: of each query's scores the greatest, the reciprocal of the
                     // normaliser, and the weights' mean of their gradients
  Summed dk, dv;     // (batch, heads, splits, r, headdim)
};

// What dropout multiplies one query's weights with.
template <class T>
class Kept {
 public:
  __device__ __forceinline__ Kept(const AttendArguments& a, int64_t row_and_head, int64_t frame)
      : threshold_(a.dropout.threshold), scale_(static_cast<T>(a.dropout.keep_scale)), keys_{} {
    if (threshold_ > 0) keys_ = dropout_keys(static_cast<uint64_t>(*a.seed), row_and_head, frame);
  }
  __device__ __forceinline__ T operator()(int64_t rank) const {
    if (threshold_ == 0) return T(1);
    return dropout_hash(keys_, static_cast<uint32_t>(rank)) < threshold_ ? T(0) : scale_;
  }

 private:
  uint32_t threshold_;
  T scale_;
  DropoutKeys keys_;
};

// A tile of queries with its shared memory: the scores over all keys, (r, queries).
template <class T, int M>
class Queries {
 public:
  static constexpr int kQueries = kSide * M, kRow = kQueries + kPad;
  static constexpr int kRankItems = 32 / sizeof(T), kRanks = kSide * kRankItems;  // of a tile of scores
  using Left = Streamed<T, M, true>;
  using Right = Streamed<T, kRankItems, true>;
  static_assert(kRanks >= kColumns, "the right stage holds columns, too");

  static int64_t shared_bytes(int64_t rank) {
    return (rank * kRow + Left::kElements + Right::kElements + kThreads + 2 * kQueries) * static_cast<int64_t>(sizeof(T));
  }

  int64_t row, head, first;
  int64_t valid;  // of the queries, less than 1 in the padding
  T *scores, *left, *right;

  __device__ explicit Queries(const AttendArguments& a) : a_(a) {
    int64_t index = blockIdx.x;
    first = take(index, ceil_div(a.frames, kQueries)) * kQueries;
    head = take(index, a.heads), row = index;
    valid = a.sequences.sequence(row).end - first;
    scores = shared_memory<T>();
    left = scores + a.rank * kRow;
    right = left + Left::kElements;
    scratch_ = right + Right::kElements;
    most_ = scratch_ + kThreads;
    reciprocals_ = most_ + kQueries;
  }

  __device__ __forceinline__ int64_t row_and_head() const { return row * a_.heads + head; }

  // Products of rows of x, shaped as q, with those of y, shaped as k, from rank on.
  __device__ __forceinline__ void products(const View<4>& x, const View<4>& y, int64_t rank, T (&sums)[M][kRankItems]) const {
    accumulate(Left{column_by_column(x, at(x, row, head, first)), valid, left},
               Right{column_by_column(y, at(y, row, head, rank)), a_.rank - rank, right}, a_.headdim, sums);
  }

  // Calls f(i, j, run) for the scores of the keys from rank on: a thread's j-th key, and its queries from the i-th on.
  template <class F>
  __device__ __forceinline__ void each_run(int64_t rank, F&& f) const {
    const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
    for (int j = 0; j < kRankItems; ++j) {
      const int64_t r = rank + position<kRankItems>(x, j);
      if (r >= a_.rank) continue;
#pragma unroll
      for (int i = 0; i < M; i += kRun<M>) f(i, j, *reinterpret_cast<Run<T, kRun<M>>*>(scores + r * kRow + position<M>(y, i)));
    }
  }

  // exp(scores - the query's greatest), the greatest and the reciprocal of the sum.
  __device__ void attend() const {
    for (int64_t rank = 0; rank < a_.rank; rank += kRanks) {
      T sums[M][kRankItems] = {};
      products(a_.q, a_.k, rank, sums);
      each_run(rank, [&](int i, int j, auto& run) {
#pragma unroll
        for (int k = 0; k < kRun<M>; ++k) run.item[k] = sums[i + k][j] * static_cast<T>(a_.scale);
      });
    }
    // Each query is a thread's of every team; teams take ranks in turn.
    constexpr int kTeams = kThreads / kQueries;
    const int t = threadIdx.x % kQueries, team = threadIdx.x / kQueries;
    __syncthreads();
    T most = scores[t];
    for (int64_t r = team; r < a_.rank; r += kTeams) most = greater(most, scores[r * kRow + t]);
    scratch_[threadIdx.x] = most;
    __syncthreads();
    for (int i = 0; i < kTeams; ++i) most = greater(most, scratch_[i * kQueries + t]);
    __syncthreads();
    T sum = 0;
    for (int64_t r = team; r < a_.rank; r += kTeams) {
      T& score = scores[r * kRow + t];
      score = exp_of(score - most);
      sum += score;
    }
    scratch_[threadIdx.x] = sum;
    __syncthreads();
    if (team == 0) {
      for (int i = 1; i < kTeams; ++i) sum += scratch_[i * kQueries + t];
      most_[t] = most;
      reciprocals_[t] = T(1) / sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ T most(int t) const { return most_[t]; }
  __device__ __forceinline__ T reciprocal(int t) const { return reciprocals_[t]; }

  // to = factor(t) * the sum over ranks of what is in place of scores times rows of y, which is shaped as k.
  template <class F>
  __device__ void times(const View<4>& y, const View<4>& to, F&& factor) const {
    for (int64_t column = 0; column < a_.headdim; column += kColumns) {
      T sums[M][4] = {};
      if (valid > 0)
        accumulate(Resident<T>{scores, kRow},
                   Streamed<T, 4, false>{row_by_row(y, at(y, row, head, int64_t(0), column)), a_.headdim - column, right},
                   a_.rank, sums);
      each(sums, [&](int t, int c, T sum) {
        if (first + t < a_.frames && column + c < a_.headdim)
          store_element<Tagged>(at(to, row, head, first + t, column + c), to.dtype, 0, t < valid ? sum * factor(t) : T(0));
      });
    }
  }

 private:
  static __device__ __forceinline__ T greater(T a, T b) { return a > b ? a : b; }

  const AttendArguments& a_;
  T *scratch_, *most_, *reciprocals_;
};

template <class T, int M>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) attend(const AttendArguments a) {
  using Tile = Queries<T, M>;
  const Tile tile(a);
  if (tile.valid > 0) {
    tile.attend();
    if (a.dropout.threshold > 0) {
      const int t = threadIdx.x % Tile::kQueries, team = threadIdx.x / Tile::kQueries;
      const Kept<T> kept(a, tile.row_and_head(), tile.first + t);
      for (int64_t r = team; r < a.rank; r += kThreads / Tile::kQueries) tile.scores[r * Tile::kRow + t] *= kept(r);
    }
  }
  tile.times(a.v, a.out, [&](int t) { return tile.reciprocal(t); });
}

// dq of a tile of queries, and the statistics that attend_keys needs of them. With P the weights, dP their gradients:
// d scores = P (dP - sum P dP), in place of the scores, to be divided by the normaliser in the end. dP of all keys is
// computed twice rather than held.
template <class T, int M>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) attend_queries(const AttendArguments a) {
  using Tile = Queries<T, M>;
  constexpr int N = Tile::kRankItems;
  const Tile tile(a);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  if (tile.valid > 0) {
    tile.attend();
    T dweights[M][N], mean[M] = {};
    const auto differentiate = [&](int64_t rank) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) dweights[i][j] = 0;
      tile.products(a.grad, a.v, rank, dweights);
      if (a.dropout.threshold == 0) return;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const Kept<T> kept(a, tile.row_and_head(), tile.first + position<M>(y, i));
#pragma unroll
        for (int j = 0; j < N; ++j) dweights[i][j] *= kept(rank + position<N>(x, j));
      }
    };
    for (int64_t rank = 0; rank < a.rank; rank += Tile::kRanks) {
      differentiate(rank);
      tile.each_run(rank, [&](int i, int j, const auto& run) {
#pragma unroll
        for (int k = 0; k < kRun<M>; ++k) mean[i + k] += run.item[k] * dweights[i + k][j];
      });
    }
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int lane = kSide / 2; lane > 0; lane /= 2) mean[i] += __shfl_xor_sync(0xffffffff, mean[i], lane);
      mean[i] *= tile.reciprocal(position<M>(y, i));
    }
    for (int64_t rank = 0; rank < a.rank; rank += Tile::kRanks) {
      if (a.rank > Tile::kRanks) differentiate(rank);
      tile.each_run(rank, [&](int i, int j, auto& run) {
#pragma unroll
        for (int k = 0; k < kRun<M>; ++k) run.item[k] *= dweights[i + k][j] - mean[i + k];
      });
    }
    const int64_t queries = a.batch * a.heads * a.frames;
    T* statistics = static_cast<T*>(a.statistics) + tile.row_and_head() * a.frames + tile.first;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int t = position<M>(y, i);
      if (x > 0 || t >= tile.valid) continue;
      statistics[t] = tile.most(t);
      statistics[queries + t] = tile.reciprocal(t);
      statistics[2 * queries + t] = mean[i];
    }
  }
  tile.times(a.k, a.dq, [&](int t) { return tile.reciprocal(t) * static_cast<T>(a.scale); });
}

// What the queries of one split add to the gradients of a tile of keys and values: kColumns of them, kSide * N columns.
template <class T, int N>
struct Keys {
  static constexpr int kFrames = 4 * kSide, kRow = kColumns + kPad;
  using Stage = Streamed<T, 4, true>;
  using Right = Streamed<T, N, false>;
  static_assert(N >= 4, "the right stage holds that of scores, too");
  static constexpr int64_t kBytes = (2 * kFrames * kRow + Stage::kElements + Right::kElements) * sizeof(T);
};
template <class T, int N>
__global__ void __launch_bounds__(kThreads, N == 4 ? kBlocks<T> : 1) attend_keys(const AttendArguments a) {
  using Tile = Keys<T, N>;
  constexpr int kFrames = Tile::kFrames, kRow = Tile::kRow;
  int64_t index = blockIdx.x;
  const int64_t column = take(index, ceil_div(a.headdim, kSide * N)) * (kSide * N);
  const int64_t rank = take(index, ceil_div(a.rank, kColumns)) * kColumns;
  const int64_t split = take(index, a.splits), head = take(index, a.heads), row = index;
  const Split frames(a.sequences.sequence(row).end, split);
  if (frames.absent()) return;
  const int64_t row_and_head = row * a.heads + head, queries = a.batch * a.heads * a.frames;
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  T* weights = shared_memory<T>();  // (frames, ranks), as dropout leaves them
  T* dscores = weights + kFrames * kRow;
  T* left = dscores + kFrames * kRow;
  T* right = left + Tile::Stage::kElements;
  T dk[4][N] = {}, dv[4][N] = {};
  for (int64_t first = frames.begin; first < frames.end; first += kFrames) {
    const int64_t valid = at_most(frames.end - first, kFrames);
    const auto products = [&](const View<4>& of_frames, const View<4>& of_ranks, T(&sums)[4][4]) {
      accumulate(typename Tile::Stage{column_by_column(of_frames, at(of_frames, row, head, first)), valid, left},
                 typename Tile::Stage{column_by_column(of_ranks, at(of_ranks, row, head, rank)), a.rank - rank, right}, a.headdim,
                 sums);
    };
    T scores[4][4] = {}, dweights[4][4] = {};
    products(a.q, a.k, scores);
    products(a.grad, a.v, dweights);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = position<4>(y, i);
      T most = 0, reciprocal = 0, mean = 0;
      if (t < valid) {
        const T* statistics = static_cast<const T*>(a.statistics) + row_and_head * a.frames + first + t;
        most = statistics[0], reciprocal = statistics[queries], mean = statistics[2 * queries];
      }
      const Kept<T> kept(a, row_and_head, first + t);
      Run<T, 4> used, gradients;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const T weight = exp_of(scores[i][j] * static_cast<T>(a.scale) - most) * reciprocal, keep = kept(rank + position<4>(x, j));
        used.item[j] = weight * keep;
        gradients.item[j] = weight * (dweights[i][j] * keep - mean);
      }
      *reinterpret_cast<Run<T, 4>*>(weights + t * kRow + position<4>(x, 0)) = used;
      *reinterpret_cast<Run<T, 4>*>(dscores + t * kRow + position<4>(x, 0)) = gradients;
    }
    const auto add = [&](const T* of_scores, const View<4>& of_frames, T(&sums)[4][N]) {
      accumulate(Resident<T>{of_scores, kRow},
                 typename Tile::Right{row_by_row(of_frames, at(of_frames, row, head, first, column)), a.headdim - column, right}, valid,
                 sums);
    };
    add(dscores, a.q, dk);
    add(weights, a.grad, dv);
  }
  const auto store = [&](T(&sums)[4][N], const Summed& to, T factor) {
    each(sums, [&](int r, int c, T sum) {
      if (rank + r < a.rank && column + c < a.headdim)
        store_element<Tagged>(to.data, to.dtype, ((row_and_head * a.splits + split) * a.rank + rank + r) * a.headdim + column + c,
                              sum * factor);
    });
  };
  store(dk, a.dk, static_cast<T>(a.scale));
  store(dv, a.dv, T(1));
}

// ---- Sums of parts ----

struct SumArguments {
  const void* parts;  // (groups, splits, size) in the math type
  Summed out;         // (groups, size)
  int64_t groups, splits, size;
  int64_t heads;  // of a sequence, one group each, with as many parts as it has splits; 0: every group has all parts
  Sequences sequences;
  bool normalize;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts(const SumArguments a) {
  int64_t index = blockIdx.x;
  const int64_t element = take(index, ceil_div(a.size, kThreads)) * kThreads + threadIdx.x, group = index;
  if (element >= a.size) return;
  const int64_t length = a.heads > 0 ? a.sequences.sequence(group / a.heads).end : 0;
  const int64_t own = a.heads > 0 ? linformer_splits(length) : a.splits;
  const T* parts = static_cast<const T*>(a.parts) + group * a.splits * a.size + element;
  T sum = parts[0];
  for (int64_t i = 1; i < own; ++i) sum += parts[i * a.size];
  store_element<Tagged>(a.out.data, a.out.dtype, group * a.size + element, sum * length_factor<T>(length, a.normalize));
}

// ---- Launching ----

// Calls f with the math type that goes with a storage type.
template <class F>
void with_math(DType dtype, F&& f) {
  dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

dim3 blocks(int64_t count) { return {grid_dim(count, kGridX, "tiles")}; }

// Where a kernel leaves the parts of a result, which sum() then adds; the result itself where there is one part of each.
class Parts {
 public:
  Parts(const Tensor& out, DType dtype, DType math, int64_t splits, int64_t groups) : sum_{}, memory_(out) {
    sum_.out = to = {out.data_ptr(), dtype};
    sum_.groups = groups;
    sum_.splits = splits;
    sum_.size = groups > 0 ? out.numel() / groups : 0;
    if (splits <= 1) return;
    memory_ = empty({groups, splits, sum_.size}, math);
    to = {memory_.data_ptr(), math};
    sum_.parts = to.data;
  }

  Summed to;

  // Of rows and heads, by the splits of each row.
  void sum(const Launcher& launch, int64_t heads, const Sequences& sequences, bool normalize) {
    sum_.heads = heads;
    sum_.sequences = sequences;
    sum_.normalize = normalize;
    sum(launch);
  }
  void sum(const Launcher& launch) const {
    if (sum_.splits <= 1) return;
    with_math(to.dtype, [&](auto math) {
      launch(sum_parts<decltype(math)>, blocks(sum_.groups * ceil_div(sum_.size, kThreads)), kThreads, 0, sum_);
    });
  }

 private:
  SumArguments sum_;
  Tensor memory_;
};

ProjectArguments arguments(const Tensor& x, const Tensor& proj, bool normalize, const Optional& seq_lens) {
  auto a = read_project_arguments<ProjectArguments>(x, proj, normalize);
  a.sequences = sequences_of(seq_lens, std::nullopt, a.batch, a.frames);
  a.splits = linformer_most_splits(a.frames);
  return a;
}

// Bytes of shared memory of the two stages of a product.
template <class Left, class Right, class T>
constexpr int64_t kStages = (Left::kElements + Right::kElements) * sizeof(T);

Tensor linformer_project(Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  const Launcher launch(x);
  ProjectArguments a = arguments(x, proj, normalize, seq_lens);
  const DType dtype = math_type(a.x.dtype);
  Tensor out = empty({a.batch, a.heads, a.rank, a.headdim}, dtype);
  Parts parts(out, dtype, dtype, a.splits, a.batch * a.heads);
  a.to = parts.to;
  with_math(dtype, [&](auto math) {
    using T = decltype(math);
    const auto run = [&](auto items) {
      constexpr int M = items;
      const int64_t tiles = ceil_div(a.headdim, kColumns) * ceil_div(a.rank, kSide * M);
      launch(project<T, M>, blocks(tiles * a.batch * a.heads * a.splits), kThreads,
             kStages<Streamed<T, M, false>, Streamed<T, 4, false>, T>, a);
    };
    a.rank > 4 * kSide ? run(std::integral_constant<int, 8>{}) : run(std::integral_constant<int, 4>{});
  });
  parts.sum(launch, a.heads, a.sequences, normalize);
  return out;
}

std::tuple<Tensor, Tensor> linformer_project_backward(Tensor grad, Tensor x, Tensor proj, bool normalize, Optional seq_lens) {
  const Launcher launch(x);
  ProjectArguments a = arguments(x, proj, normalize, seq_lens);
  add_gradient(a, grad, {a.batch, a.heads, a.rank, a.headdim}, a.x, "x");
  const int64_t own = a.proj.size[0], most = a.proj.size[1];
  Tensor dx = empty_frames(a.x), dproj = empty({own, most, a.rank}, a.proj.dtype);
  a.dx = view<4>(dx, "dx");
  // Tiles alone would leave a large GPU idle where sequences are short: rows and heads are shared out, too.
  constexpr int64_t kWanted = 256;
  const int64_t tiles = own * ceil_div(most, kWeightFrames) * ceil_div(a.rank, kColumns);
  const int64_t items = a.batch * (own == 1 ? a.heads : 1);
  a.shares = tiles == 0 || items == 0 ? 1 : std::min(ceil_div(kWanted, tiles), items);
  Parts parts(dproj, a.proj.dtype, math_type(a.x.dtype), a.shares, own);
  a.dproj = parts.to;
  with_math(a.x.dtype, [&](auto math) {
    using T = decltype(math);
    constexpr int kFrames = 8 * kSide;
    launch(unproject<T>, blocks(ceil_div(a.headdim, kColumns) * ceil_div(a.frames, kFrames) * a.batch * a.heads), kThreads,
           kStages<Streamed<T, 8, true>, Streamed<T, 4, false>, T>, a);
    launch(project_weights<T>, blocks(tiles * a.shares), kThreads, kStages<Streamed<T, 8, true>, Streamed<T, 4, true>, T>, a);
  });
  parts.sum(launch);
  return {dx, dproj};
}

AttendArguments arguments(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p, const Optional& seed,
                          const Optional& seq_lens) {
  auto a = read_attend_arguments<AttendArguments>(q, k, v, scale, dropout_p, seed);
  if (dropout_p > 0) a.seed = static_cast<const int64_t*>(seed->data_ptr());
  a.sequences = sequences_of(seq_lens, std::nullopt, a.batch, a.frames);
  return a;
}

// Calls f(T, M): the largest tile of queries whose scores leave a block under 99 KB of shared memory, which every GPU has.
template <class F>
void with_queries(const AttendArguments& a, F&& f) {
  const bool many = a.rank > kMostLinformerRanks / 2;
  if (a.q.dtype == DType::kFloat64)
    many ? f(double{}, std::integral_constant<int, 1>{}) : f(double{}, std::integral_constant<int, 2>{});
  else
    many ? f(float{}, std::integral_constant<int, 2>{}) : f(float{}, std::integral_constant<int, 4>{});
}
template <class Tile>
dim3 query_blocks(const AttendArguments& a) {
  return blocks(ceil_div(a.frames, Tile::kQueries) * a.batch * a.heads);
}

Tensor linformer_attend(Tensor q, Tensor k, Tensor v, double scale, double dropout_p, Optional seed, Optional seq_lens) {
  const Launcher launch(q);
  AttendArguments a = arguments(q, k, v, scale, dropout_p, seed, seq_lens);
  Tensor out = empty_frames(a.q);
  a.out = view<4>(out, "out");
  with_queries(a, [&](auto math, auto items) {
    using Tile = Queries<decltype(math), items>;
    launch(attend<decltype(math), items>, query_blocks<Tile>(a), kThreads, Tile::shared_bytes(a.rank), a);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linformer_attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, double scale,
                                                             double dropout_p, Optional seed, Optional seq_lens) {
  const Launcher launch(q);
  AttendArguments a = arguments(q, k, v, scale, dropout_p, seed, seq_lens);
  const DType dtype = math_type(a.q.dtype);
  add_gradient(a, grad, {a.batch, a.heads, a.frames, a.headdim}, a.q, "q");
  a.splits = linformer_most_splits(a.frames);
  Tensor dq = empty_frames(a.q), dk = empty_as(k, a.k.dtype), dv = empty_as(v, a.v.dtype);
  Tensor statistics = empty({3, a.batch, a.heads, a.frames}, dtype);
  a.dq = view<4>(dq, "dq");
  a.statistics = statistics.data_ptr();
  Parts dk_parts(dk, a.k.dtype, dtype, a.splits, a.batch * a.heads), dv_parts(dv, a.v.dtype, dtype, a.splits, a.batch * a.heads);
  a.dk = dk_parts.to;
  a.dv = dv_parts.to;
  with_queries(a, [&](auto math, auto items) {
    using T = decltype(math);
    using Tile = Queries<T, items>;
    launch(attend_queries<T, items>, query_blocks<Tile>(a), kThreads, Tile::shared_bytes(a.rank), a);
    const auto keys = [&](auto columns) {
      constexpr int N = columns;
      const int64_t tiles = ceil_div(a.headdim, kSide * N) * ceil_div(a.rank, kColumns);
      launch(attend_keys<T, N>, blocks(tiles * a.splits * a.batch * a.heads), kThreads, Keys<T, N>::kBytes, a);
    };
    // Each tile of columns computes the scores again: few of them, where registers allow.
    if constexpr (sizeof(T) == 4) {
      if (a.headdim > kColumns) return keys(std::integral_constant<int, 8>{});
    }
    keys(std::integral_constant<int, 4>{});
  });
  dk_parts.sum(launch, a.heads, a.sequences, false);
  dv_parts.sum(launch, a.heads, a.sequences, false);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) {
  m.impl("linformer_project", TORCH_BOX(&linconv::linformer_project));
  m.impl("linformer_project_backward", TORCH_BOX(&linconv::linformer_project_backward));
  m.impl("linformer_attend", TORCH_BOX(&linconv::linformer_attend));
  m.impl("linformer_attend_backward", TORCH_BOX(&linconv::linformer_attend_backward));
}
