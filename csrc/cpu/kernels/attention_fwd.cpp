// Attention, forward: a task's queries stay, blocks of keys pass by. Keys and values are packed once a block for
// all rows of the task; the softmax reads the scores of 32 rows while they are in the first-level cache.
#include "attention.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kKeys = 256;        // packed at once
constexpr int64_t kStep = 4 * kSide;  // columns between two products
// Weights are relative to the maximum of the first keys seen, which is as good as any until a sum comes near to
// overflow: then the row's maximum moves, and its weights are made again.
constexpr float kMost = 0x1p60f;

template <class F>
struct Sizes {
  int64_t rows, row_blocks, depth, values;  // in blocks but for rows
  Sizes(const Attention& a, int64_t n)
      : rows(padded(n)), row_blocks(blocks(n)), depth(blocks(a.d)), values(blocks(a.dv)) {}
};

template <class F>
struct Buffers {
  typename F::Element *q, *k, *v, *p[2];
  float *s[2], *o, *m, *l, *keep;
  char *k_values, *v_values;  // a block of an int8 cache
  Buffers(Workspace w, const Attention& a, const Sizes<F>& n) {
    q = w.take<typename F::Element>(n.row_blocks * n.depth * F::kBlock);
    k = w.take<typename F::Element>(kKeys / kSide * n.depth * F::kBlock);
    v = w.take<typename F::Element>(kKeys / kSide * n.values * F::kBlock);
    for (auto& one : p) one = w.take<typename F::Element>(kKeys / kSide * F::kBlock);
    for (auto& one : s) one = w.take<float>(kSide * kKeys);
    o = w.take<float>(n.rows * n.values * kSide);
    m = w.take<float>(n.rows);
    l = w.take<float>(n.rows);
    keep = w.take<float>(kKeys);
    k_values = w.take<char>(a.int8 ? kKeys * a.d * size_of(a.type) : 0);
    v_values = w.take<char>(a.int8 ? kKeys * a.dv * size_of(a.type) : 0);
    end = w.next;
  }
  char* end;
};

// How many of a row block's vector steps there are for each product that waits.
template <class F>
struct Pace {
  Queue<F>& queue;
  int64_t steps, passed = 0, total;
  Pace(Queue<F>& q, int64_t all) : queue(q), steps(all), total(q.left()) {}
  // Whether a product is due with this step; makes those that should have been before.
  inline __attribute__((always_inline)) bool due() {
    if (!Queue<F>::kMixes) return false;
    ++passed;
    return (total - queue.left()) * steps < total * passed;
  }
};

// The weights of a row's columns, relative to its maximum, as a row of the left operand; returns their sum. Products
// that wait are made in between.
template <class F, bool kDropout>
BK_INLINE float weigh(const float* x, int64_t begin, int64_t end, float factor, float shift, int r, const float* keep,
                      typename F::Element* p, Pace<F>& pace) {
  vf sum[kVectors] = {};
  auto block = [&](int64_t c) __attribute__((always_inline)) {
    vf e[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      e[v] = vexp2(load(x + c + v * W) * factor - shift);
      sum[v] += e[v];
      if (kDropout) e[v] *= load(keep + c + v * W);
    }
    F::put_left(p + c / kSide * F::kBlock, r, e);
  };
  int64_t c = begin;
  if constexpr (Queue<F>::kMixes) {
    Queue<F>& queue = pace.queue;
    for (; c + kStep <= end; c += kStep) {
      bool due = pace.due() && queue.begin();
      if (due) queue.template quarter<0>();
      block(c);
      if (due) queue.template quarter<1>();
      block(c + kSide);
      if (due) queue.template quarter<2>();
      block(c + 2 * kSide);
      if (due) queue.template quarter<3>();
      block(c + 3 * kSide);
      if (due) queue.end();
    }
  }
  for (; c < end; c += kSide) block(c);
  for (int v = 1; v < kVectors; ++v) sum[0] += sum[v];
  return BK_ISA::sum(sum[0]);
}

BK_INLINE float largest(const float* x, int64_t begin, int64_t end) {
  vf m[kVectors];
  for (int v = 0; v < kVectors; ++v) m[v] = load(x + begin + v * W);
  for (int64_t c = begin + kSide; c < end; c += kSide)
    for (int v = 0; v < kVectors; ++v) m[v] = vmax(load(x + c + v * W), m[v]);
  for (int v = 1; v < kVectors; ++v) m[0] = vmax(m[v], m[0]);
  return max(m[0]);
}

// Moves a row's weights and values to a new maximum.
BK_INLINE void rescale(float* m, float* l, float* o, int64_t width, float highest) {
  float scale = *m == -kInfinity ? 0.0f : vexp2(splat(*m - highest))[0];
  for (int64_t i = 0; i < width; i += W) store(o + i, load(o + i) * scale);
  *l *= scale;
  *m = highest;
}

template <class F, class T>
void softmax(const RowBlock<T>& row_block, const Buffers<F>& w, float* scores, typename F::Element* p, int64_t at,
             int64_t width, Queue<F>& queue) {
  const Attention& a = row_block.u.a;
  bool is_plain = plain(a);
  float factor = is_plain ? a.scale * kLog2e : 1.0f;
  bool all = sees_all(row_block);
  Pace<F> pace(queue, kSide * ((row_block.end - row_block.begin) / kStep));
  for (int r = 0; r < kSide; ++r) {
    float* x = scores + r * kKeys;
    float *m = w.m + at + r, *l = w.l + at + r, *o = w.o + (at + r) * width;
    if (!is_plain) adjust(row_block, r, x, nullptr);
    if (!all) hide(row_block, r, x);
    if (a.threshold) kept(row_block, r, w.keep);
    auto weighed = [&] {
      float shift = *m == -kInfinity ? 0.0f : *m;
      return a.threshold ? weigh<F, true>(x, row_block.begin, row_block.end, factor, shift, r, w.keep, p, pace)
                         : weigh<F, false>(x, row_block.begin, row_block.end, factor, shift, r, w.keep, p, pace);
    };
    if (*m == -kInfinity) rescale(m, l, o, width, largest(x, row_block.begin, row_block.end) * factor);
    float sum = weighed();
    if (!(sum < kMost)) {
      float highest = largest(x, row_block.begin, row_block.end) * factor;
      if (highest > *m) rescale(m, l, o, width, highest);
      sum = weighed();
    }
    *l += sum;
  }
}

template <class Q, class T>
void finish(const Unit<T>& u, const AttentionTask& task, const float* o, const float* m, const float* l,
            int64_t width) {
  constexpr int64_t kAhead = 16;  // rows: each may be on a page of its own
  const Attention& a = u.a;
  auto out = u.template query_rows<Q>(a.out);
  for (int64_t r = task.begin; r < task.end; ++r) {
    int64_t at = r - task.begin;
    float top = m[at], total = l[at], scale = 1;
    if (a.sinks) {
      float sink = a.sinks[u.head + r % u.group_size] * kLog2e, higher = sink > top ? sink : top;
      scale = top == -kInfinity ? 0.0f : vexp2(splat(top - higher))[0];
      total = total * scale + vexp2(splat(sink - higher))[0];
      top = higher;
    }
    if (a.lse) a.lse[u.lse_at(r)] = total == 0 ? -kInfinity : (float)(((double)top + __builtin_log2(total)) / kLog2e);
    scale = total == 0 ? 0.0f : scale / (total * (1 - a.dropout_p));
    Q* to = out.get(out, r);
    if (r + kAhead < task.end)
      for (int64_t i = 0; i < a.dv; i += 64 / (int64_t)sizeof(Q))
        __builtin_prefetch(out.get(out, r + kAhead) + i, 1, 2);
    const float* from = o + at * width;
    int64_t i = 0;
    for (; i + W <= a.dv; i += W) store(to + i, load(from + i) * scale);
    if (i < a.dv) store(to + i, load(from + i) * scale, a.dv - i);
  }
}

// The block of an int8 cache that begins with token `key`, as numbers; row r of the result is token r.
template <class T>
StridedRows<T> values_of(const Unit<T>& u, const Attention::Heads& x, const Attention::Heads& scales, int64_t d,
                         int64_t key, char* memory) {
  const int8_t* from = (const int8_t*)x.data + u.batch * x.batch + u.group * x.head;
  const float* scale = (const float*)scales.data + u.batch * scales.batch + u.group * scales.head;
  T* to = (T*)memory;
  for (int64_t t = key; t < key + kKeys && t < u.keys; ++t, to += d) {
    const int8_t* codes = from + t * x.token;
    float by = scale[t * scales.token];
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + i, load(codes + i) * by);
    if (i < d) store(to + i, load(codes + i, d - i) * by, d - i);
  }
  return {(T*)memory - key * d, d, u.keys};
}

template <class T>
void run(const Attention& a, const AttentionTask& task, void* workspace) {
  typedef typename FormatOf<T>::type F;
  Unit<T> u(a, task.batch, task.group);
  Sizes<F> n(a, task.end - task.begin);
  Buffers<F> w({(char*)workspace}, a, n);
  int64_t width = n.values * kSide;
  fill(w.o, 0, n.rows * width, 0.0f);
  fill(w.l, 0, n.rows, 0.0f);
  fill(w.m, 0, n.rows, -kInfinity);
  Queue<F> queue;
  F::begin();
  if (a.floats)
    pack_left<F, float>(u.template query_rows<float>(a.q), task.begin, n.row_blocks, a.d, w.q);
  else
    pack_left<F, T>(u.query_rows(a.q), task.begin, n.row_blocks, a.d, w.q);
  auto keys = u.key_rows(a.k), values = u.key_rows(a.v);
  Columns all = seen_by(u, task.begin, task.end, 0, u.keys);
  for (int64_t key = all.begin / kKeys * kKeys; key < all.end; key += kKeys) {
    Columns block = seen_by(u, task.begin, task.end, key, key + kKeys < u.keys ? key + kKeys : u.keys);
    if (block.begin == block.end) continue;
    int64_t first = (block.begin - key) / kSide, count = blocks(block.end - key);  // of the block's 32s
    if (a.int8) {
      keys = values_of<T>(u, a.k, a.k_scale, a.d, key, w.k_values);
      values = values_of<T>(u, a.v, a.v_scale, a.dv, key, w.v_values);
    }
    each_block<F, T>(keys, key + first * kSide, count - first, a.d,
                     [&](int64_t j, int64_t i, const typename F::Element* staged) {
                       F::right_transposed(w.k + ((first + j) * n.depth + i) * F::kBlock, staged);
                     });
    each_block<F, T>(values, key + first * kSide, count - first, a.dv,
                     [&](int64_t j, int64_t i, const typename F::Element* staged) {
                       F::right(w.v + (i * (kKeys / kSide) + first + j) * F::kBlock, staged);
                     });
    // A row block's scores are made, and the one before it is multiplied by the values, while this one's weights are.
    auto columns = [&](int64_t s) {
      int64_t row = task.begin + s * kSide;
      Columns c = seen_by(u, row, row + kSide, key, block.end);
      return c.begin == c.end ? Columns{0, 0} : Columns{(c.begin - key) / kSide, blocks(c.end - key)};
    };
    auto score = [&](int64_t s, Columns c) {
      for (int64_t j = c.begin; j < c.end; ++j)
        queue.push(w.s[s % 2] + j * kSide, kKeys, w.q + s * n.depth * F::kBlock, w.k + j * n.depth * F::kBlock, a.d,
                   kSide, false);
    };
    auto add = [&](int64_t s, Columns c) {
      if (c.begin == c.end) return;
      for (int64_t i = 0; i < n.values; ++i) {
        queue.push(w.o + s * kSide * width + i * kSide, width, w.p[s % 2] + c.begin * F::kBlock,
                   w.v + (i * (kKeys / kSide) + c.begin) * F::kBlock, (c.end - c.begin) * kSide, a.dv - i * kSide,
                   true);
      }
    };
    Columns before{0, 0}, now = columns(0);
    queue.clear();
    score(0, now);
    queue.finish();
    for (int64_t s = 0; s < n.row_blocks; ++s) {
      // The next block of keys, a few with each row block.
      int64_t next = key + kKeys + kKeys * s / n.row_blocks, last = key + kKeys + kKeys * (s + 1) / n.row_blocks;
      if (next < all.end && !a.int8) {
        prefetch_rows(keys, next, last, a.d);
        prefetch_rows(values, next, last, a.dv);
      }
      Columns after = s + 1 < n.row_blocks ? columns(s + 1) : Columns{0, 0};
      queue.clear();
      add(s - 1, before);
      score(s + 1, after);
      if (now.begin < now.end)
        softmax<F, T>({u, task.begin + s * kSide, key, now.begin * kSide, now.end * kSide}, w, w.s[s % 2], w.p[s % 2],
                      s * kSide, width, queue);
      queue.finish();
      before = now, now = after;
    }
    queue.clear();
    add(n.row_blocks - 1, before);
    queue.finish();
  }
  F::end();
  a.floats ? finish<float>(u, task, w.o, w.m, w.l, width) : finish<T>(u, task, w.o, w.m, w.l, width);
}

}  // namespace

void attention_fwd(const Attention& a, const AttentionTask& task, void* workspace) {
  by_type(a.type, [&](auto t) { run<decltype(t)>(a, task, workspace); });
}

template <class T>
static int64_t workspace_of(const Attention& a, int64_t rows) {
  typedef typename FormatOf<T>::type F;
  return Buffers<F>({nullptr}, a, Sizes<F>(a, rows)).end - (char*)nullptr;
}

int64_t attention_fwd_workspace(const Attention& a, int64_t rows) {
  return by_type(a.type, [&](auto t) { return workspace_of<decltype(t)>(a, rows); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
