// Attention, backward: a block of keys stays, the rows pass by; five products for each pair. Probabilities come from
// the saved logsumexp. Gradients of keys and values are held in float32 until all rows have passed; those of the
// queries are summed in a float32 slab, one for each range of keys that runs on its own, so that the sums have one
// order.
#include "attention.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kKeys = 256;  // that stay
constexpr int64_t kRows = 128;  // that pass at once: the depth of the products for the keys' gradients
constexpr int64_t kKeyBlocks = kKeys / kSide, kRowBlocks = kRows / kSide;

// What is made once of the rows of a unit. Names: q and g (the gradient of the output) as left operands whose depth is
// the head, and transposed ones whose depth is the rows.
template <class F>
struct Rows {
  typedef typename F::Element E;
  int64_t row_blocks, depth, values, width, splits;
  E *q, *q_transposed, *g, *g_transposed;
  float *lse, *lse_rest, *delta, *grad_q;
  float* exact;  // delta of the sinks' gradient without grad_lse, from weights; null where outputs were not rounded
  Rows(const Attention& a, int64_t rows, int64_t splits, void* memory)
      : row_blocks(blocks(rows)), depth(blocks(a.d)), values(blocks(a.dv)), width(depth * kSide), splits(splits) {
    Workspace w{(char*)memory};
    q = w.take<E>(row_blocks * depth * F::kBlock);
    q_transposed = w.take<E>(row_blocks * depth * F::kBlock);
    g = w.take<E>(row_blocks * values * F::kBlock);
    g_transposed = w.take<E>(row_blocks * values * F::kBlock);
    lse = w.take<float>(row_blocks * kSide);
    lse_rest = w.take<float>(row_blocks * kSide);
    delta = w.take<float>(row_blocks * kSide);
    exact = a.grad_sinks && a.type != Type::f32 ? w.take<float>(splits * row_blocks * kSide) : nullptr;
    grad_q = w.take<float>(splits * row_blocks * kSide * width);
    end = w.next;
  }
  char* end;
};

template <class F>
struct Buffers {
  typedef typename F::Element E;
  E *k_transposed, *k, *v_transposed, *p, *ds_left, *ds;
  float *s, *dp, *grad_k, *grad_v, *slope, *keep, *transposed;
  Buffers(const Attention& a, void* memory) {
    int64_t depth = blocks(a.d), values = blocks(a.dv), wider = depth > values ? depth : values;
    Workspace w{(char*)memory};
    k_transposed = w.take<E>(kKeyBlocks * depth * F::kBlock);
    k = w.take<E>(kKeyBlocks * depth * F::kBlock);
    v_transposed = w.take<E>(kKeyBlocks * values * F::kBlock);
    p = w.take<E>(kKeyBlocks * kRowBlocks * F::kBlock);
    ds = w.take<E>(kKeyBlocks * kRowBlocks * F::kBlock);
    ds_left = w.take<E>(kKeyBlocks * kRowBlocks * F::kBlock);
    s = w.take<float>(kSide * kKeys);
    dp = w.take<float>(kSide * kKeys);
    slope = w.take<float>(2 * kKeys);
    keep = w.take<float>(2 * kKeys);
    grad_k = w.take<float>(depth * kSide * kKeys);
    grad_v = w.take<float>(values * kSide * kKeys);
    transposed = w.take<float>(kSide * wider * kSide);
    end = w.next;
  }
  char* end;
};

template <class T>
void prepare(const Attention& a, const AttentionTask& task, int64_t splits, void* memory) {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;
  Unit<T> u(a, task.batch, task.group);
  Rows<F> n(a, u.rows, splits, memory);
  int64_t first = task.begin / kSide, count = blocks(task.end) - first;
  auto queries = u.query_rows(a.q), grads = u.query_rows(a.grad);
  pack_left<F, T>(queries, task.begin, count, a.d, n.q + first * n.depth * F::kBlock);
  pack_left<F, T>(grads, task.begin, count, a.dv, n.g + first * n.values * F::kBlock);
  each_block<F, T>(queries, task.begin, count, a.d, [&](int64_t j, int64_t i, const E* staged) {
    F::left_transposed(n.q_transposed + (i * n.row_blocks + first + j) * F::kBlock, staged);
  });
  each_block<F, T>(grads, task.begin, count, a.dv, [&](int64_t j, int64_t i, const E* staged) {
    F::left_transposed(n.g_transposed + (i * n.row_blocks + first + j) * F::kBlock, staged);
  });
  row_sums(u, task.begin, padded(task.end), n.lse + task.begin, n.lse_rest + task.begin, n.delta + task.begin);
  int64_t rows = count * kSide;
  for (int64_t s = 0; s < splits; ++s) {
    fill(n.grad_q + (s * n.row_blocks * kSide + task.begin) * n.width, 0, rows * n.width, 0.0f);
    if (n.exact) fill(n.exact + s * n.row_blocks * kSide + task.begin, 0, rows, 0.0f);
  }
}

// Weights and the gradients of scores, of two rows (r and r + 16) from their products.
template <class F, class T>
struct Differentiate {
  const RowBlock<T>& row_block;
  const Rows<F>& n;
  const Buffers<F>& w;
  float* exact;   // of the row block's rows, or null
  int64_t block;  // number of the row block among those that pass at once
  float factor, keep_scale;
  bool is_plain, all;

  template <bool kSlope, bool kDropout, bool kExact>
  inline __attribute__((always_inline)) void rows(int r) const {
    int64_t row = row_block.row + r;
    float lse[2] = {n.lse[row], n.lse[row + 16]}, delta[2] = {n.delta[row], n.delta[row + 16]};
    float rest[2] = {n.lse_rest[row], n.lse_rest[row + 16]};
    vf sum[2] = {};
    for (int64_t c = row_block.begin; c < row_block.end; c += kSide) {
      int64_t j = c / kSide;
      vf p[2][kVectors], ds[2][kVectors];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const float* x = w.s + (r + 16 * half) * kKeys + c;
        const float* dp = w.dp + (r + 16 * half) * kKeys + c;
        for (int v = 0; v < kVectors; ++v) {
          vf t = load(x + v * W) * factor - lse[half], g = load(dp + v * W);
          if (sizeof(T) == 4) t -= rest[half];
          vf e = vexp2(t);
          p[half][v] = e;
          if (kDropout) {
            vf keep = load(w.keep + half * kKeys + c + v * W);
            p[half][v] = e * keep;
            g = g * keep * keep_scale;
          }
          if (kExact) sum[half] += e * g;
          ds[half][v] = e * (g - delta[half]);
          if (kSlope) ds[half][v] *= load(w.slope + half * kKeys + c + v * W);
        }
      }
      F::put_right(w.p + (j * kRowBlocks + block) * F::kBlock, r, p[0], p[1]);
      F::put_right(w.ds + (j * kRowBlocks + block) * F::kBlock, r, ds[0], ds[1]);
      F::put_left(w.ds_left + (block * kKeyBlocks + j) * F::kBlock, r, ds[0]);
      F::put_left(w.ds_left + (block * kKeyBlocks + j) * F::kBlock, r + 16, ds[1]);
    }
    if (kExact)
      for (int half = 0; half < 2; ++half) exact[r + 16 * half] += BK_ISA::sum(sum[half]);
  }
  template <bool kSlope, bool kDropout>
  inline __attribute__((always_inline)) void rows(int r) const {
    exact ? rows<kSlope, kDropout, true>(r) : rows<kSlope, kDropout, false>(r);
  }

  void operator()() const {
    const Attention& a = row_block.u.a;
    bool slope = a.softcap > 0;
    for (int r = 0; r < 16; ++r) {
      for (int half = 0; half < 2; ++half) {
        int i = r + 16 * half;
        if (!is_plain) adjust(row_block, i, w.s + i * kKeys, slope ? w.slope + half * kKeys : nullptr);
        if (!all) hide(row_block, i, w.s + i * kKeys);
        if (a.threshold) kept(row_block, i, w.keep + half * kKeys);
      }
      if (slope)
        a.threshold ? rows<true, true>(r) : rows<true, false>(r);
      else
        a.threshold ? rows<false, true>(r) : rows<false, false>(r);
    }
  }
};

// Writes the gradient of 32 keys, held as columns, as rows of a tensor.
template <class T>
void put_keys(const StridedRows<T>& to, int64_t key, const float* columns, float* transposed, int64_t size,
              float scale) {
  int64_t width = padded(size);
  for (int64_t i = 0; i < width; i += 16)
    for (int64_t j = 0; j < kSide; j += 16)
      transpose16(columns + i * kKeys + j, kKeys * 4, transposed + j * width + i, width * 4);
  for (int64_t r = 0; r < kSide && key + r < to.count; ++r) {
    T* out = const_cast<T*>(to.first) + (key + r) * to.stride;
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, load(transposed + r * width + i) * scale);
    if (i < size) store(out + i, load(transposed + r * width + i) * scale, size - i);
  }
}

// The gradients of keys [task.begin, task.end) of a unit, and what these keys give to the queries' gradient.
template <class T>
void keys_of(const Attention& a, const AttentionTask& task, int64_t split, int64_t splits, void* memory,
             void* workspace) {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;
  Unit<T> u(a, task.batch, task.group);
  Rows<F> n(a, u.rows, splits, memory);
  Buffers<F> w(a, workspace);
  float* grad_q = n.grad_q + split * n.row_blocks * kSide * n.width;
  bool is_plain = plain(a);
  float factor = is_plain ? a.scale * kLog2e : 1.0f, keep_scale = 1 / (1 - a.dropout_p);
  // The weight of the only key is 1 whatever its score is. By sums of rounded products it would be nearly so.
  bool alone = u.keys == 1 && !a.sinks && !a.grad_lse;
  auto keys = u.key_rows(a.k), values = u.key_rows(a.v);
  auto grad_k = u.key_rows(a.grad_k), grad_v = u.key_rows(a.grad_v);
  F::begin();
  for (int64_t key = task.begin; key < task.end; key += kKeys) {
    int64_t last = key + kKeys < task.end ? key + kKeys : task.end, count = blocks(last - key);
    each_block<F, T>(keys, key, count, a.d, [&](int64_t j, int64_t i, const E* staged) {
      F::right_transposed(w.k_transposed + (j * n.depth + i) * F::kBlock, staged);
      F::right(w.k + (i * kKeyBlocks + j) * F::kBlock, staged);
    });
    each_block<F, T>(values, key, count, a.dv, [&](int64_t j, int64_t i, const E* staged) {
      F::right_transposed(w.v_transposed + (j * n.values + i) * F::kBlock, staged);
    });
    fill(w.grad_k, 0, n.depth * kSide * kKeys, 0.0f);
    fill(w.grad_v, 0, n.values * kSide * kKeys, 0.0f);
    for (int64_t first = 0; first < n.row_blocks; first += kRowBlocks) {
      int64_t passing = n.row_blocks - first < kRowBlocks ? n.row_blocks - first : kRowBlocks;
      // For each row block the blocks of keys that it sees; for each block of keys the row blocks that see it.
      Columns of_row_block[kRowBlocks], of_keys[kKeyBlocks];
      for (int64_t j = 0; j < count; ++j) of_keys[j] = {kRowBlocks, 0};
      bool any = false;
      for (int64_t s = 0; s < passing; ++s) {
        int64_t row = (first + s) * kSide;
        Columns c = seen_by(u, row, row + kSide, key, last);
        of_row_block[s] = c.begin == c.end ? Columns{0, 0} : Columns{(c.begin - key) / kSide, blocks(c.end - key)};
        any |= c.begin != c.end;
        for (int64_t j = of_row_block[s].begin; j < of_row_block[s].end; ++j) {
          if (s < of_keys[j].begin) of_keys[j].begin = s;
          of_keys[j].end = s + 1;
        }
      }
      if (!any) continue;
      for (int64_t s = 0; s < passing; ++s) {
        Columns c = of_row_block[s];
        for (int64_t j = 0; j < count; ++j) {
          if (j < c.begin || j >= c.end) {
            if (s < of_keys[j].begin || s >= of_keys[j].end) continue;
            __builtin_memset(w.p + (j * kRowBlocks + s) * F::kBlock, 0, sizeof(E) * F::kBlock);
            __builtin_memset(w.ds + (j * kRowBlocks + s) * F::kBlock, 0, sizeof(E) * F::kBlock);
            continue;
          }
          F::multiply(w.s + j * kSide, kKeys, n.q + (first + s) * n.depth * F::kBlock,
                      w.k_transposed + j * n.depth * F::kBlock, a.d, kSide, kSide, false);
          F::multiply(w.dp + j * kSide, kKeys, n.g + (first + s) * n.values * F::kBlock,
                      w.v_transposed + j * n.values * F::kBlock, a.dv, kSide, kSide, false);
        }
        if (c.begin == c.end) continue;
        RowBlock<T> row_block{u, (first + s) * kSide, key, c.begin * kSide, c.end * kSide};
        float* exact = n.exact ? n.exact + (split * n.row_blocks + first + s) * kSide : nullptr;
        Differentiate<F, T>{row_block, n, w, exact, s, factor, keep_scale, is_plain, sees_all(row_block)}();
        for (int64_t i = 0; i < n.depth && !alone; ++i)
          F::multiply(grad_q + (first + s) * kSide * n.width + i * kSide, n.width,
                      w.ds_left + (s * kKeyBlocks + c.begin) * F::kBlock, w.k + (i * kKeyBlocks + c.begin) * F::kBlock,
                      (c.end - c.begin) * kSide, kSide, a.d - i * kSide, true);
      }
      for (int64_t j = 0; j < count; ++j) {
        int64_t s = of_keys[j].begin, depth = (of_keys[j].end - s) * kSide;
        if (depth <= 0) continue;
        for (int64_t i = 0; i < n.values; ++i)
          F::multiply(w.grad_v + i * kSide * kKeys + j * kSide, kKeys,
                      n.g_transposed + (i * n.row_blocks + first + s) * F::kBlock,
                      w.p + (j * kRowBlocks + s) * F::kBlock, depth, a.dv - i * kSide, kSide, true);
        for (int64_t i = 0; i < n.depth && !alone; ++i)
          F::multiply(w.grad_k + i * kSide * kKeys + j * kSide, kKeys,
                      n.q_transposed + (i * n.row_blocks + first + s) * F::kBlock,
                      w.ds + (j * kRowBlocks + s) * F::kBlock, depth, a.d - i * kSide, kSide, true);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      put_keys(grad_k, key + j * kSide, w.grad_k + j * kSide, w.transposed, a.d, a.scale);
      put_keys(grad_v, key + j * kSide, w.grad_v + j * kSide, w.transposed, a.dv, keep_scale);
    }
  }
  F::end();
}

// The slabs' sum, in the order of the keys, as the queries' gradient; the sinks' gradient of the unit's heads.
template <class T>
void finish(const Attention& a, const AttentionTask& task, int64_t splits, void* memory) {
  typedef typename FormatOf<T>::type F;
  Unit<T> u(a, task.batch, task.group);
  Rows<F> n(a, u.rows, splits, memory);
  auto out = u.query_rows(a.grad_q);
  int64_t slab = n.row_blocks * kSide * n.width;
  for (int64_t r = task.begin; r < task.end; ++r) {
    const float* from = n.grad_q + r * n.width;
    T* to = out.get(out, r);
    for (int64_t i = 0; i < a.d; i += W) {
      vf sum = load(from + i);
      for (int64_t s = 1; s < splits; ++s) sum += load(from + s * slab + i);
      if (i + W <= a.d)
        store(to + i, sum * a.scale);
      else
        store(to + i, sum * a.scale, a.d - i);
    }
    if (a.grad_sinks) {
      int64_t head = u.head + r % u.group_size;
      double score = (double)a.sinks[head] * kLog2e - n.lse[r] - n.lse_rest[r];
      double weight = vexp2(splat((float)score))[0];
      double delta = n.delta[r];
      if (n.exact) {
        delta = a.grad_lse ? -(double)a.grad_lse[u.lse_at(r)] : 0;
        for (int64_t s = 0; s < splits; ++s) delta += n.exact[s * n.row_blocks * kSide + r];
      }
      a.grad_sinks[u.batch * a.heads + head] -= weight * delta;
    }
  }
}

template <class T>
int64_t rows_bytes(const Attention& a, int64_t rows, int64_t splits) {
  return Rows<typename FormatOf<T>::type>(a, rows, splits, nullptr).end - (char*)nullptr;
}
template <class T>
int64_t buffers_bytes(const Attention& a) {
  return Buffers<typename FormatOf<T>::type>(a, nullptr).end - (char*)nullptr;
}

}  // namespace

void attention_bwd_rows(const Attention& a, const AttentionTask& task, int64_t splits, void* memory) {
  by_type(a.type, [&](auto t) { prepare<decltype(t)>(a, task, splits, memory); });
}
void attention_bwd_keys(const Attention& a, const AttentionTask& task, int64_t split, int64_t splits, void* memory,
                        void* workspace) {
  by_type(a.type, [&](auto t) { keys_of<decltype(t)>(a, task, split, splits, memory, workspace); });
}
void attention_bwd_finish(const Attention& a, const AttentionTask& task, int64_t splits, void* memory) {
  by_type(a.type, [&](auto t) { finish<decltype(t)>(a, task, splits, memory); });
}
int64_t attention_bwd_memory(const Attention& a, int64_t rows, int64_t splits) {
  return by_type(a.type, [&](auto t) { return rows_bytes<decltype(t)>(a, rows, splits); });
}
int64_t attention_bwd_workspace(const Attention& a) {
  return by_type(a.type, [&](auto t) { return buffers_bytes<decltype(t)>(a); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
