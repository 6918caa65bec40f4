// The gradient of attention's bias. Scores and the gradients of weights are made again, so that every element of the
// bias, also one that batches, heads, queries or keys share, is summed by one task in one order.
#include "attention.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kKeys = 256;

template <class F>
struct Buffers {
  typedef typename F::Element E;
  E *q, *g, *k, *v;
  float *s, *dp, *keep, *lse, *lse_rest, *delta, *sum;
  Buffers(const Attention& a, int64_t queries, void* memory) {
    int64_t depth = blocks(a.d), values = blocks(a.dv);
    Workspace w{(char*)memory};
    q = w.take<E>(blocks(queries) * depth * F::kBlock);
    g = w.take<E>(blocks(queries) * values * F::kBlock);
    k = w.take<E>(kKeys / kSide * depth * F::kBlock);
    v = w.take<E>(kKeys / kSide * values * F::kBlock);
    s = w.take<float>(kSide * kKeys);
    dp = w.take<float>(kSide * kKeys);
    keep = w.take<float>(kKeys);
    lse = w.take<float>(padded(queries));
    lse_rest = w.take<float>(padded(queries));
    delta = w.take<float>(padded(queries));
    sum = w.take<float>((a.bias_size[2] == 1 ? 1 : padded(queries)) * padded(a.keys));
    end = w.next;
  }
  char* end;
};

// Adds the gradients of the scores of one head's queries [begin, end).
template <class F, class T>
void add_head(const Unit<T>& u, int64_t begin, int64_t end, const Buffers<F>& w) {
  typedef typename F::Element E;
  const Attention& a = u.a;
  if (u.keys == 1 && !a.sinks && !a.grad_lse) return;  // whatever its score is, the only key's weight is 1
  int64_t depth = blocks(a.d), values = blocks(a.dv), row_blocks = blocks(end - begin), width = padded(a.keys);
  float keep_scale = 1 / (1 - a.dropout_p);
  pack_left<F, T>(u.query_rows(a.q), begin, row_blocks, a.d, w.q);
  pack_left<F, T>(u.query_rows(a.grad), begin, row_blocks, a.dv, w.g);
  row_sums(u, begin, begin + row_blocks * kSide, w.lse, w.lse_rest, w.delta);
  Columns all = seen_by(u, begin, end, 0, u.keys);
  for (int64_t key = all.begin / kKeys * kKeys; key < all.end; key += kKeys) {
    int64_t last = key + kKeys < all.end ? key + kKeys : all.end, count = blocks(last - key);
    each_block<F, T>(u.key_rows(a.k), key, count, a.d, [&](int64_t j, int64_t i, const E* staged) {
      F::right_transposed(w.k + (j * depth + i) * F::kBlock, staged);
    });
    each_block<F, T>(u.key_rows(a.v), key, count, a.dv, [&](int64_t j, int64_t i, const E* staged) {
      F::right_transposed(w.v + (j * values + i) * F::kBlock, staged);
    });
    for (int64_t s = 0; s < row_blocks; ++s) {
      int64_t row = begin + s * kSide;
      Columns c = seen_by(u, row, row + kSide, key, last);
      if (c.begin == c.end) continue;
      RowBlock<T> row_block{u, row, key, (c.begin - key) / kSide * kSide, padded(c.end - key)};
      for (int64_t j = row_block.begin / kSide; j < row_block.end / kSide; ++j) {
        F::multiply(w.s + j * kSide, kKeys, w.q + s * depth * F::kBlock, w.k + j * depth * F::kBlock, a.d, kSide, kSide,
                    false);
        F::multiply(w.dp + j * kSide, kKeys, w.g + s * values * F::kBlock, w.v + j * values * F::kBlock, a.dv, kSide,
                    kSide, false);
      }
      bool sees = sees_all(row_block);
      for (int r = 0; r < kSide && row + r < end; ++r) {
        float *x = w.s + r * kKeys, lse = w.lse[s * kSide + r], rest = w.lse_rest[s * kSide + r],
              delta = w.delta[s * kSide + r];
        adjust(row_block, r, x, nullptr);
        if (!sees) hide(row_block, r, x);
        if (a.threshold) kept(row_block, r, w.keep);
        float* to = w.sum + (a.bias_size[2] == 1 ? 0 : s * kSide + r) * width + key;
        for (int64_t i = row_block.begin; i < row_block.end; i += W) {
          vf g = load(w.dp + r * kKeys + i);
          if (a.threshold) g = g * load(w.keep + i) * keep_scale;
          store(to + i, load(to + i) + vexp2(load(x + i) - lse - rest) * (g - delta));
        }
      }
    }
  }
}

template <class B>
void put(const Attention& a, const AttentionTask& task, const float* sum) {
  int64_t width = padded(a.keys), rows = a.bias_size[2] == 1 ? 1 : task.end - task.begin, keys = a.bias_size[3];
  int64_t first = (task.batch * a.bias_size[1] + task.group) * a.bias_size[2];
  if (a.bias_size[2] != 1) first += task.begin;
  for (int64_t r = 0; r < rows; ++r) {
    B* to = (B*)a.grad_bias + (first + r) * keys;
    const float* from = sum + r * width;
    if (keys == 1) {
      double total = 0;
      for (int64_t i = 0; i < a.keys; ++i) total += from[i];
      store(to, splat((float)total), 1);
      continue;
    }
    for (int64_t i = 0; i < keys; i += W) store(to + i, load(from + i), keys - i < W ? keys - i : W);
  }
}

template <class T>
void run(const Attention& a, const AttentionTask& task, void* workspace) {
  typedef typename FormatOf<T>::type F;
  Buffers<F> w(a, task.end - task.begin, workspace);
  fill(w.sum, 0, (a.bias_size[2] == 1 ? 1 : padded(task.end - task.begin)) * padded(a.keys), 0.0f);
  F::begin();
  int64_t group_size = a.heads / a.groups;
  for (int64_t b = 0; b < a.batches; ++b) {
    if (a.bias_size[0] != 1 && b != task.batch) continue;
    for (int64_t h = 0; h < a.heads; ++h) {
      if (a.bias_size[1] != 1 && h != task.group) continue;
      add_head<F, T>(Unit<T>(a, b, h / group_size, h, 1), task.begin, task.end, w);
    }
  }
  F::end();
  by_type(a.bias_type, [&](auto t) { put<decltype(t)>(a, task, w.sum); });
}

}  // namespace

void attention_bias_bwd(const Attention& a, const AttentionTask& task, void* workspace) {
  by_type(a.type, [&](auto t) { run<decltype(t)>(a, task, workspace); });
}

int64_t attention_bias_bwd_workspace(const Attention& a, int64_t queries) {
  return by_type(a.type, [&](auto t) {
    return Buffers<typename FormatOf<decltype(t)>::type>(a, queries, nullptr).end - (char*)nullptr;
  });
}

}  // namespace BK_ISA
}  // namespace bigkernels
