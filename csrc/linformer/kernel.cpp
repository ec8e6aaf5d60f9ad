#include "linformer/kernel.h"

#include "common/arena.h"
#include "common/factors.h"
#include "common/panels.h"

namespace linconv::LINCONV_ISA {
namespace {

constexpr int kDepth = 128;   // frames that a projection sums in registers
constexpr int kSumsBytes = 256 * 1024;  // of what heads that are projected together sum: a share of L2
constexpr int kQueries = 32;  // whose scores over r keys stay near the core

// Columns of scratch rows: whole panels, and a vector more, lest rows a power of two apart fall into the same cache sets.
template <class T>
int leading(int64_t columns) {
  return round_up(static_cast<int>(columns), kPanel<T>) + kWidth<T>;
}

// `count` rows of a row and head from row `first` on, to scratch: numbers of the math type, or factors along or across them.
template <class T>
void load_rows(const View<4>& view, int64_t row, int64_t head, int64_t first, int64_t count, T* to, int ld) {
  load_rows_along(at(view, row, head), view.dtype, view.stride[2], view.stride[3], first, count, view.size[3], to, ld);
}
template <class F>
void load_rows_across(const View<4>& view, int64_t row, int64_t head, int64_t first, int64_t count, F* to, int ld) {
  load_rows_across(at(view, row, head), view.dtype, view.stride[2], view.stride[3], first, count, view.size[3], to, ld);
}
template <class F>
void load_rows(const View<3>& view, int64_t head, int64_t first, int64_t count, F* to, int ld) {
  load_rows_along(at(view, view.size[0] == 1 ? 0 : head), view.dtype, view.stride[1], view.stride[2], first, count,
                  view.size[2], to, ld);
}
template <class F>
void load_rows_across(const View<3>& view, int64_t head, int64_t first, int64_t count, F* to, int ld) {
  load_rows_across(at(view, view.size[0] == 1 ? 0 : head), view.dtype, view.stride[1], view.stride[2], first, count,
                   view.size[2], to, ld);
}

// The same rows, to be asked for ahead. Elements apart from each other, each on a line of its own, are not worth it.
Ahead rows_ahead(const View<4>& view, int64_t row, int64_t head, int64_t first, int64_t count) {
  if (view.stride[3] != 1 || count <= 0) return {};
  const int64_t size = element_size(view.dtype);
  return {at(view, row, head, first), view.stride[2] * size, static_cast<int>(count), view.size[3] * size};
}

template <class T>
void store_rows(const View<4>& view, int64_t row, int64_t head, int64_t first, int64_t count, const T* from, int ld) {
  store_rows(at(view, row, head, first), view.dtype, view.stride[2], view.stride[3], count, view.size[3], from, int64_t(ld));
}
template <class T>
void clear_rows(const View<4>& view, int64_t row, int64_t head, int64_t first, int64_t last) {
  const T zeros[64] = {};
  for (int64_t t = first; t < last; ++t)
    for (int64_t c = 0; c < view.size[3]; c += 64)
      store_row(at(view, row, head, t, c), view.dtype, view.stride[3], min<int64_t>(64, view.size[3] - c), zeros);
}

template <class T>
void scale_elements(T factor, int64_t n, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

template <class T>
T length_factor(int64_t length, bool normalize) {
  if (!normalize || length == 0) return T(1);
  return T(1) / (sizeof(T) == 8 ? __builtin_sqrt(static_cast<double>(length)) : __builtin_sqrtf(static_cast<float>(length)));
}

// ---- Projection ----

template <class T, class F>
class Project {
 public:
  explicit Project(const LinformerProjectArgs& args)
      : args_(args), rank_(args.rank), headdim_(args.headdim), ranks_(round_up(rank_, kTileRows)), ldp_(leading<T>(rank_)),
        ldx_(leading<T>(headdim_)), size_(int64_t(ranks_) * ldx_), heads_(most_heads()),
        arena_(Arena::bytes<F>(kDepth * ldp_) + Arena::bytes<F>(kDepth * ldx_) + 2 * Arena::bytes<T>(heads_ * size_)) {
    proj_ = arena_.template take<F>(kDepth * ldp_);
    x_ = arena_.template take<F>(kDepth * ldx_);
    sums_ = arena_.template take<T>(heads_ * size_);
    total_ = arena_.template take<T>(heads_ * size_);
  }

  // Task `index` and those behind it, before `end`, that take the same frames and the same projection: the first task left.
  int64_t run(int64_t index, int64_t end) {
    const int64_t first_head = index % args_.heads, group = index / args_.heads;
    const int64_t row = group / args_.splits_in_memory(), length = args_.length(row), splits = linformer_splits(length);
    const int heads = static_cast<int>(min(min<int64_t>(heads_, end - index), args_.heads - first_head));
    if (args_.parts != nullptr) {
      const int64_t split = group % args_.splits;
      if (split < splits) {
        add(row, split, first_head, heads, sums_);
        splits > 1 ? keep(row, split, first_head, heads) : finish(row, first_head, heads, sums_);
      }
      return index + heads;
    }
    add(row, 0, first_head, heads, total_);
    for (int64_t split = 1; split < splits; ++split) {
      add(row, split, first_head, heads, sums_);
      for (int64_t i = 0; i < heads * size_; ++i) total_[i] += sums_[i];
    }
    finish(row, first_head, heads, total_);
    return index + heads;
  }

 private:
  int most_heads() const {
    if (args_.proj.size[0] > 1) return 1;
    const int64_t fit = kSumsBytes / (int64_t(sizeof(T)) * size_);
    return static_cast<int>(fit < 1 ? 1 : min(fit, args_.heads));
  }

  // The sums of one split's frames, to `sums`.
  void add(int64_t row, int64_t split, int64_t first_head, int heads, T* sums) {
    const int64_t length = args_.length(row), frames = linformer_split_frames(length);
    const int64_t begin = split * frames, end = min(length, begin + frames);
    if (end == 0)
      for (int64_t i = 0; i < heads * size_; ++i) sums[i] = 0;
    for (int64_t t = begin; t < end; t += kDepth) {
      const int count = static_cast<int>(min<int64_t>(kDepth, end - t));
      load_rows_across(args_.proj, first_head, t, count, proj_, ldp_);
      for (int h = 0; h < heads; ++h) {
        load_rows_across(args_.x, row, first_head + h, t, count, x_, ldx_);
        const Ahead next = h + 1 < heads
                               ? rows_ahead(args_.x, row, first_head + h + 1, t, count)
                               : rows_ahead(args_.x, row, first_head, t + kDepth, min<int64_t>(kDepth, end - t - kDepth));
        if (t == begin)
          multiply<Update::kStore>(static_cast<int>(factors<F>(count)), sums + h * size_, next);
        else
          multiply<Update::kAdd>(static_cast<int>(factors<F>(count)), sums + h * size_, next);
      }
    }
  }

  template <Update update>
  void multiply(int depth, T* sums, Ahead next) {
    if (headdim_ > 1) {
      const int columns = round_up(headdim_, kWidth<T>);
      gemm<T, update, Triangle::kNone>(ranks_, columns, depth, {proj_, 1, ldp_}, x_, ldx_, sums, ldx_, next);
      return;
    }
    for (int i = 0; i < rank_; i += kWidth<T>) {  // vectors of ranks: a single column would leave most lanes unused
      Vec<T> sum{};
      for (int t = 0; t < depth; ++t) sum = add_product(sum, load(proj_ + t * ldp_ + i), splat(x_[t * ldx_]));
      for (int lane = 0; lane < kWidth<T> && i + lane < rank_; ++lane) {
        T& to = sums[(i + lane) * ldx_];
        to = update == Update::kAdd ? to + sum[lane] : sum[lane];
      }
    }
  }

  void finish(int64_t row, int64_t first_head, int heads, T* sums) {
    scale_elements(length_factor<T>(args_.length(row), args_.normalize), heads * size_, sums);
    for (int h = 0; h < heads; ++h) store_rows(args_.out, row, first_head + h, 0, rank_, sums + h * size_, ldx_);
  }

  void keep(int64_t row, int64_t split, int64_t first_head, int heads) {
    for (int h = 0; h < heads; ++h) {
      T* part = static_cast<T*>(args_.parts) +
                ((row * args_.heads + first_head + h) * args_.splits + split) * rank_ * headdim_;
      const T* sums = sums_ + h * size_;
      for (int i = 0; i < rank_; ++i) store_row(part + int64_t(i) * headdim_, kMathDType<T>, 1, headdim_, sums + i * ldx_);
    }
  }

  const LinformerProjectArgs& args_;
  const int rank_, headdim_, ranks_, ldp_, ldx_;
  const int64_t size_;  // of one head's sums
  const int heads_;     // at once, which share the rows of proj they read
  Arena arena_;
  F *proj_, *x_;        // (kDepth, rank), (kDepth, headdim), across the frames
  T *sums_, *total_;    // (heads_, rank, headdim): of one split, and of those behind each other
};

template <class T, class F = T>
void project(const LinformerProjectArgs& args, int64_t begin, int64_t end) {
  Project<T, F> pass(args);
  while (begin < end) begin = pass.run(begin, end);
}

template <class T>
void sum_parts(const LinformerSumArgs& args, int64_t begin, int64_t end) {
  const int64_t size = args.rank * args.headdim;
  const int n = static_cast<int>(args.headdim);
  Arena arena(Arena::bytes<T>(n));
  T* total = arena.take<T>(n);
  for (; begin < end; ++begin) {
    const int64_t row = begin / args.heads, length = args.spans[row].end, splits = linformer_splits(length);
    if (splits == 1 && !args.uncut) continue;
    const T factor = length_factor<T>(length, args.normalize);
    for (int64_t i = 0; i < args.rank; ++i) {
      const T* part = static_cast<const T*>(args.parts) + begin * args.splits * size + i * n;
      for (int c = 0; c < n; ++c) total[c] = part[c];
      for (int64_t s = 1; s < splits; ++s)
        for (int c = 0; c < n; ++c) total[c] += part[s * size + c];
      scale_elements(factor, n, total);
      store_row(at(args.out, row, begin % args.heads, i), args.out.dtype, args.out.stride[3], n, total);
    }
  }
}

// The gradient of a row's and head's projected frames, with the factor of its length, as the two products read it.
template <class F>
struct PackedGradient {
  F *rows, *panels;  // (rank, leading(headdim)), across the ranks; its transpose in panels

  PackedGradient(const LinformerProjectArgs& args, int64_t row, int64_t head)
      : rows(static_cast<F*>(args.packed) + (row * args.heads + head) * linformer_packed(args.rank, args.headdim)),
        panels(rows + args.rank * leading<F>(args.headdim)) {}
};

template <class T, class F = T>
void pack(const LinformerProjectArgs& args, int64_t begin, int64_t end) {
  const int rank = static_cast<int>(args.rank), headdim = static_cast<int>(args.headdim), ld = leading<T>(headdim);
  const int64_t size = int64_t(round_up(rank, kPanel<T>)) * ld;
  Arena arena(Arena::bytes<T>(size) + Arena::bytes<F>(size));
  T* grad = arena.take<T>(size);
  F* scratch = arena.take<F>(size);
  for (; begin < end; ++begin) {
    const int64_t row = begin / args.heads, head = begin % args.heads;
    const PackedGradient<F> to(args, row, head);
    load_rows(args.grad, row, head, 0, rank, grad, ld);
    scale_elements(length_factor<T>(args.length(row), args.normalize), int64_t(rank) * ld, grad);
    const F* rows = across(grad, rank, headdim, ld, scratch);
    for (int64_t i = 0; i < factors<F>(rank) * ld; ++i) to.rows[i] = rows[i];
    along(grad, rank, headdim, ld, scratch);
    F* by_row = scratch;
    if constexpr (__is_same(F, T)) by_row = grad;
    transpose_to_panels(by_row, ld, rank, static_cast<int>(factors<F>(headdim)), to.panels);
  }
}

// dx = proj grad
template <class T, class F = T>
void unproject(const LinformerProjectArgs& args, int64_t begin, int64_t end) {
  const int rank = static_cast<int>(args.rank), headdim = static_cast<int>(args.headdim);
  const int ldp = leading<T>(rank), ldx = leading<T>(headdim);
  const int64_t blocks = (args.frames + kLinformerBlock - 1) / kLinformerBlock;
  Arena arena(Arena::bytes<F>(kLinformerBlock * ldp) + Arena::bytes<T>(kLinformerBlock * ldx));
  F* proj = arena.take<F>(kLinformerBlock * ldp);
  T* dx = arena.take<T>(kLinformerBlock * ldx);
  for (; begin < end; ++begin) {
    const int64_t row = begin / blocks, first = begin % blocks * kLinformerBlock;
    const int64_t last = min(first + kLinformerBlock, args.frames), length = args.length(row);
    const int count = static_cast<int>(length < first ? 0 : min(last, length) - first);
    for (int64_t h = 0; h < args.heads; ++h) {
      if (count > 0) {
        if (h == 0 || args.proj.size[0] > 1) load_rows(args.proj, h, first, count, proj, ldp);
        const PackedGradient<F> grad(args, row, h);
        gemm<T, Update::kStore, Triangle::kNone>(round_up(count, kTileRows), round_up(headdim, kWidth<T>),
                                                 static_cast<int>(factors<F>(rank)), {proj, ldp, 1}, grad.rows, ldx, dx, ldx);
        store_rows(args.dx, row, h, first, count, dx, ldx);
      }
      clear_rows<T>(args.dx, row, h, first + count, last);
    }
  }
}

// dproj = the sum over rows, and heads that share it, of x grad^T
template <class T, class F = T>
void project_weights(const LinformerProjectArgs& args, int64_t begin, int64_t end) {
  const int headdim = static_cast<int>(args.headdim), ldx = leading<T>(headdim);
  const int depth = static_cast<int>(factors<F>(headdim));
  const int64_t height = panel_height<F>(depth);
  constexpr int ld = kLinformerRanks + kWidth<T>;
  const int64_t proj_heads = args.proj.size[0], proj_frames = args.proj.size[1];
  const int64_t rank_blocks = (args.rank + kLinformerRanks - 1) / kLinformerRanks;
  const int64_t blocks = (proj_frames + kLinformerBlock - 1) / kLinformerBlock;
  Arena arena(Arena::bytes<F>(kLinformerBlock * ldx) + Arena::bytes<T>(kLinformerBlock * ld));
  F* x = arena.take<F>(kLinformerBlock * ldx);
  T* sums = arena.take<T>(kLinformerBlock * ld);
  for (; begin < end; ++begin) {
    const int64_t column = begin % rank_blocks * kLinformerRanks;
    const int64_t first = begin / rank_blocks % blocks * kLinformerBlock, own = begin / rank_blocks / blocks;
    const int64_t last = min(first + kLinformerBlock, proj_frames);
    const int columns = static_cast<int>(min<int64_t>(kLinformerRanks, args.rank - column));
    for (int i = 0; i < kLinformerBlock * ld; ++i) sums[i] = 0;
    for (int64_t row = 0; row < args.batch; ++row) {
      const int64_t length = args.length(row);
      if (length <= first) continue;
      const int count = static_cast<int>(min(last, length) - first), tiled = round_up(count, kTileRows);
      for (int64_t h = own; h < args.heads; h += proj_heads > 1 ? args.heads : 1) {
        load_rows(args.x, row, h, first, count, x, ldx);
        for (int i = count * ldx; i < tiled * ldx; ++i) x[i] = F{};
        const F* panels = PackedGradient<F>(args, row, h).panels + column * height;
        gemm_panels<T, Update::kAdd>(tiled, columns, depth, {x, ldx, 1}, panels, sums, ld);
      }
    }
    for (int64_t t = first; t < last; ++t)
      store_row(at(args.dproj, own, t, column), args.dproj.dtype, args.dproj.stride[2], columns, sums + (t - first) * ld);
  }
}

// ---- Attention ----

// What the frames of one row and head attend to, as the products read it.
template <class T, class F>
class Keys {
 public:
  Keys(const LinformerAttendArgs& args, bool backward)
      : args_(args), backward_(backward), rank(args.rank), headdim(args.headdim), columns(round_up(rank, kPanel<T>)),
        lds(leading<T>(rank)), ldx(leading<T>(headdim)), arena_(bytes()) {
    loaded_ = arena_.template take<T>(size());
    by_row_ = arena_.template take<F>(size());
    k_panels = arena_.template take<F>(panels_size<F>(rank, headdim));
    v_panels = arena_.template take<F>(panels_size<F>(rank, headdim));
    k = arena_.template take<F>(size());
    v = arena_.template take<F>(size());
  }

  void load(int64_t row, int64_t head) {
    prepare(args_.k, row, head, static_cast<T>(args_.scale), k_panels, backward_ ? k : nullptr);
    prepare(args_.v, row, head, T(1), backward_ ? v_panels : nullptr, v);
  }

  // exp(scores - their maximum) of `count` rows of q, and the reciprocal of each row's sum.
  void attend(const F* q, int count, T* scores, T* reciprocals) const {
    const int depth = static_cast<int>(factors<F>(headdim));
    gemm_panels<T, Update::kStore>(round_up(count, kTileRows), columns, depth, {q, ldx, 1}, k_panels, scores, lds);
    for (int i = 0; i < count; i += kRowsTogether) softmax(scores + i * lds, reciprocals + i);
  }

 private:
  static constexpr int kRowsTogether = 4;  // the latencies of one hide behind the others
  static_assert(kTileRows % kRowsTogether == 0);

  void softmax(T* scores, T* reciprocals) const {
    using linconv::LINCONV_ISA::load;
    const int vectors = round_up(rank, kWidth<T>);
    Vec<T> most[kRowsTogether], sums[kRowsTogether] = {};
    for (int i = 0; i < kRowsTogether; ++i) {
      for (int j = rank; j < vectors; ++j) scores[i * lds + j] = -__builtin_inff();
      most[i] = load(scores + i * lds);
    }
    for (int j = kWidth<T>; j < vectors; j += kWidth<T>)
#pragma GCC unroll 4
      for (int i = 0; i < kRowsTogether; ++i) most[i] = max(most[i], load(scores + i * lds + j));
    for (Vec<T>& lanes : most) lanes = splat(greatest(lanes));
    for (int j = 0; j < vectors; j += kWidth<T>)
#pragma GCC unroll 4
      for (int i = 0; i < kRowsTogether; ++i) {
        const Vec<T> e = exp(load(scores + i * lds + j) - most[i]);
        store(scores + i * lds + j, e);
        sums[i] += e;
      }
    for (int i = 0; i < kRowsTogether; ++i) reciprocals[i] = T(1) / sum(sums[i]);
  }

  // Rows of k or v times a factor: their transpose in panels, and as they are, across the rows. What is null is not wanted.
  void prepare(const View<4>& view, int64_t row, int64_t head, T factor, F* panels, F* rows) {
    load_rows(view, row, head, 0, rank, loaded_, ldx);
    if (factor != T(1)) scale_elements(factor, int64_t(rank) * ldx, loaded_);
    if (rows != nullptr) {
      const F* made = across(loaded_, rank, headdim, ldx, rows);
      if (made != rows) __builtin_memcpy(rows, made, int64_t(rank) * ldx * sizeof(F));
    }
    if (panels == nullptr) return;
    along(loaded_, rank, headdim, ldx, by_row_);
    F* from = by_row_;
    if constexpr (__is_same(F, T)) from = loaded_;
    transpose_to_panels(from, ldx, rank, static_cast<int>(factors<F>(headdim)), panels);
  }

  const LinformerAttendArgs& args_;
  const bool backward_;

 public:
  const int rank, headdim, columns;
  const int lds, ldx;  // of scores, and of all that has headdim columns
  F *k_panels, *k, *v, *v_panels;  // k times the scale

 private:
  int64_t size() const { return int64_t(columns) * ldx; }
  size_t bytes() const {
    return 2 * Arena::bytes<F>(panels_size<F>(rank, headdim)) + Arena::bytes<T>(size()) + 3 * Arena::bytes<F>(size());
  }
  Arena arena_;
  T* loaded_;
  F* by_row_;
};

// 1 for the weights of one query that dropout keeps, 0 for the others.
template <class T>
void draw(const Dropout& dropout, int64_t row_and_head, int64_t frame, int rank, T* kept) {
  const DropoutKeys keys = dropout_keys(dropout.seed, row_and_head, frame);
  for (int j = 0; j < rank; ++j) kept[j] = dropout_hash(keys, static_cast<uint32_t>(j)) < dropout.threshold ? T(0) : T(1);
}

template <class T, class F = T>
void attend(const LinformerAttendArgs& args, int64_t begin, int64_t end) {
  Keys<T, F> keys(args, false);
  const int lds = keys.lds, ldx = keys.ldx;
  Arena arena(Arena::bytes<F>(kQueries * ldx) + Arena::bytes<T>(kQueries * ldx) + Arena::bytes<T>(kQueries * lds) +
              Arena::bytes<F>(kQueries * lds) + Arena::bytes<T>(kQueries) + Arena::bytes<T>(lds));
  F *q = arena.take<F>(kQueries * ldx), *scratch = arena.take<F>(kQueries * lds);
  T *y = arena.take<T>(kQueries * ldx), *scores = arena.take<T>(kQueries * lds);
  T *reciprocals = arena.take<T>(kQueries), *kept = arena.take<T>(lds);
  int64_t loaded = -1;
  for (; begin < end; ++begin) {
    const int64_t row_and_head = begin / args.query_blocks(), row = row_and_head / args.heads, h = row_and_head % args.heads;
    const int64_t first = begin % args.query_blocks() * kLinformerQueries;
    const int64_t last = min(first + kLinformerQueries, args.frames), valid = min(last, args.length(row));
    if (first < valid && loaded != row_and_head) keys.load(row, h), loaded = row_and_head;
    for (int64_t t = first; t < valid; t += kQueries) {
      const int count = static_cast<int>(min<int64_t>(kQueries, valid - t)), tiled = round_up(count, kTileRows);
      load_rows(args.q, row, h, t, count, q, ldx);
      keys.attend(q, count, scores, reciprocals);
      if (args.dropout.threshold > 0)
        for (int i = 0; i < count; ++i) {
          draw(args.dropout, row_and_head, t + i, keys.rank, kept);
          for (int j = 0; j < keys.rank; ++j) scores[i * lds + j] *= kept[j];
          reciprocals[i] *= static_cast<T>(args.dropout.keep_scale);
        }
      const F* weights = along(scores, count, keys.rank, lds, scratch);
      const Ahead next = rows_ahead(args.q, row, h, t + kQueries, min<int64_t>(kQueries, valid - t - kQueries));
      gemm<T, Update::kScaleRows, Triangle::kNone>(tiled, round_up(keys.headdim, kWidth<T>),
                                                   static_cast<int>(factors<F>(keys.rank)), {weights, lds, 1}, keys.v, ldx,
                                                   y, ldx, next, {.rows = reciprocals});
      store_rows(args.out, row, h, t, count, y, ldx);
    }
    clear_rows<T>(args.out, row, h, max(first, valid), last);
  }
}

template <class T, class F>
class AttendBackward {
 public:
  explicit AttendBackward(const LinformerAttendArgs& args)
      : args_(args), keys_(args, true), lds_(keys_.lds), ldx_(keys_.ldx), ranks_(round_up(keys_.rank, kTileRows)),
        arena_(4 * Arena::bytes<F>(kLinformerBlock * ldx_) + Arena::bytes<T>(kLinformerBlock * ldx_) +
               2 * Arena::bytes<T>(kLinformerBlock * lds_) + 3 * Arena::bytes<F>(kLinformerBlock * lds_) +
               Arena::bytes<T>(kLinformerBlock) + Arena::bytes<T>(lds_) + 2 * Arena::bytes<T>(int64_t(ranks_) * ldx_)) {
    for (F*& rows : rows_) rows = arena_.template take<F>(kLinformerBlock * ldx_);
    for (F*& scratch : scratch_) scratch = arena_.template take<F>(kLinformerBlock * lds_);
    dq_ = arena_.template take<T>(kLinformerBlock * ldx_);
    weights_ = arena_.template take<T>(kLinformerBlock * lds_);
    dscores_ = arena_.template take<T>(kLinformerBlock * lds_);
    reciprocals_ = arena_.template take<T>(kLinformerBlock);
    kept_ = arena_.template take<T>(lds_);
    dk_ = arena_.template take<T>(int64_t(ranks_) * ldx_);
    dv_ = arena_.template take<T>(int64_t(ranks_) * ldx_);
  }

  void run(int64_t index) {
    const int64_t split = index % args_.splits, row_and_head = index / args_.splits;
    const int64_t row = row_and_head / args_.heads, h = row_and_head % args_.heads, length = args_.length(row);
    const int64_t splits = linformer_splits(length), frames = linformer_split_frames(length);
    if (split == 0) clear_rows<T>(args_.dq, row, h, length, args_.frames);
    if (split >= splits) return;
    for (int64_t i = 0; i < int64_t(ranks_) * ldx_; ++i) dk_[i] = dv_[i] = 0;
    const int64_t end = min(length, (split + 1) * frames);
    if (end > 0) keys_.load(row, h);
    for (int64_t t = split * frames; t < end; t += kLinformerBlock)
      block(row, h, t, static_cast<int>(min<int64_t>(kLinformerBlock, end - t)));
    // Scores are q (scale k): the scale is in keys_.k, and has to be put into dk.
    scale_elements(static_cast<T>(args_.scale), int64_t(ranks_) * ldx_, dk_);
    const int64_t part = (row_and_head * args_.splits + split) * keys_.rank * keys_.headdim;
    for (int i = 0; i < keys_.rank; ++i) {
      const int64_t to = part + int64_t(i) * keys_.headdim;
      store_row(static_cast<T*>(args_.dk_parts) + to, kMathDType<T>, 1, keys_.headdim, dk_ + i * ldx_);
      store_row(static_cast<T*>(args_.dv_parts) + to, kMathDType<T>, 1, keys_.headdim, dv_ + i * ldx_);
    }
  }

 private:
  void block(int64_t row, int64_t h, int64_t t, int count) {
    const int tiled = round_up(count, kTileRows), columns = round_up(keys_.headdim, kWidth<T>), rank = keys_.rank;
    const F *q = rows_[0], *q_across = load_both_ways(args_.q, row, h, t, count, rows_[0], rows_[1]);
    const F *dy = rows_[2], *dy_across = load_both_ways(args_.grad, row, h, t, count, rows_[2], rows_[3]);
    keys_.attend(q, count, weights_, reciprocals_);
    gemm_panels<T, Update::kStore>(tiled, keys_.columns, static_cast<int>(factors<F>(keys_.headdim)), {dy, ldx_, 1},
                                   keys_.v_panels, dscores_, lds_);
    for (int i = 0; i < count; ++i) {
      T *p = weights_ + i * lds_, *d = dscores_ + i * lds_;
      const int vectors = round_up(rank, kWidth<T>);
      if (args_.dropout.threshold > 0) {
        draw(args_.dropout, row * args_.heads + h, t + i, rank, kept_);
        scale_elements(static_cast<T>(args_.dropout.keep_scale), rank, kept_);
        for (int j = 0; j < rank; ++j) d[j] *= kept_[j];
      }
      Vec<T> dots{};
      for (int j = 0; j < vectors; j += kWidth<T>) {
        const Vec<T> weight = load(p + j) * reciprocals_[i];
        store(p + j, weight);
        dots += weight * load(d + j);
      }
      const T dot = sum(dots);
      for (int j = 0; j < vectors; j += kWidth<T>) store(d + j, load(p + j) * (load(d + j) - dot));
      if (args_.dropout.threshold > 0)
        for (int j = 0; j < rank; ++j) p[j] *= kept_[j];
    }
    const int ranks = static_cast<int>(factors<F>(rank)), depth = static_cast<int>(factors<F>(count));
    const F* by_query = along(dscores_, count, rank, lds_, scratch_[0]);
    const F *by_rank = across(dscores_, count, rank, lds_, scratch_[1]), *weights = across(weights_, count, rank, lds_, scratch_[2]);
    gemm<T, Update::kStore, Triangle::kNone>(tiled, columns, ranks, {by_query, lds_, 1}, keys_.k, ldx_, dq_, ldx_);
    store_rows(args_.dq, row, h, t, count, dq_, ldx_);
    gemm<T, Update::kAdd, Triangle::kNone>(ranks_, columns, depth, {by_rank, 1, lds_}, q_across, ldx_, dk_, ldx_);
    gemm<T, Update::kAdd, Triangle::kNone>(ranks_, columns, depth, {weights, 1, lds_}, dy_across, ldx_, dv_, ldx_);
  }

  // Rows as factors along them, to `rows`, and, where that is something else, across them: the latter.
  const F* load_both_ways(const View<4>& view, int64_t row, int64_t h, int64_t t, int count, F* rows, F* other) const {
    load_rows(view, row, h, t, count, rows, ldx_);
    if (__is_same(F, T)) return rows;
    load_rows_across(view, row, h, t, count, other, ldx_);
    return other;
  }

  const LinformerAttendArgs& args_;
  Keys<T, F> keys_;
  const int lds_, ldx_, ranks_;
  Arena arena_;
  F* rows_[4];              // (block, headdim)
  F* scratch_[3];           // (block, rank)
  T* dq_;                   // (block, headdim)
  T *weights_, *dscores_;   // (block, rank)
  T *reciprocals_, *kept_;  // (block,), (rank,)
  T *dk_, *dv_;             // (rank, headdim)
};

template <class T, class F = T>
void attend_backward(const LinformerAttendArgs& args, int64_t begin, int64_t end) {
  AttendBackward<T, F> pass(args);
  for (; begin < end; ++begin) pass.run(begin);
}

// Whether products are taken of pairs of bfloat16 numbers. Projected frames and weights are rounded to them, then.
[[maybe_unused]] bool of_pairs(const LinformerProjectArgs& args) {
  return args.x.dtype == DType::kBFloat16 && args.proj.dtype == DType::kBFloat16;
}
[[maybe_unused]] bool of_pairs(const LinformerAttendArgs& args) { return args.q.dtype == DType::kBFloat16; }

}  // namespace

// A pass over the tasks, by the factors that its products take.
#define LINCONV_BY_FACTORS(pass)                                              \
  if constexpr (kPairProducts)                                                \
    if (of_pairs(args)) return pass<float, BFloat16Pair>(args, begin, end);   \
  fp64 ? pass<double>(args, begin, end) : pass<float>(args, begin, end)

void linformer_project(const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(project);
}
void linformer_sum(const LinformerSumArgs& args, bool fp64, int64_t begin, int64_t end) {
  fp64 ? sum_parts<double>(args, begin, end) : sum_parts<float>(args, begin, end);
}
void linformer_pack(const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(pack);
}
void linformer_unproject(const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(unproject);
}
void linformer_project_weights(const LinformerProjectArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(project_weights);
}
void linformer_attend(const LinformerAttendArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(attend);
}
void linformer_attend_backward(const LinformerAttendArgs& args, bool fp64, int64_t begin, int64_t end) {
  LINCONV_BY_FACTORS(attend_backward);
}

}  // namespace linconv::LINCONV_ISA
