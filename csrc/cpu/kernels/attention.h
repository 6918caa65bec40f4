// What the attention passes share: one group of heads in one sequence, which keys a row sees, and scores from products.
#pragma once
#include "gemm.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep127f;

// The rows of q, grad, out or dq, T as they are stored.
template <class T>
struct QueryRows {
  T* data;
  int64_t head, token, group_size, count;
  BK_INLINE T* get(const QueryRows& s, int64_t r) {
    if (r >= s.count) return nullptr;
    int64_t i = s.group_size == 1 ? r : r / s.group_size;
    return s.data + (r - i * s.group_size) * s.head + i * s.token;
  }
};

// The query heads that read one key head of one sequence. Row r is query r / G of head r % G among them, so that a
// row block has few positions, and few queries still fill it.
template <class T>
struct Unit {
  const Attention& a;
  int64_t batch, head, group;  // head: the first query head
  int64_t group_size, queries, keys, rows;
  int64_t first_query, first_key;  // tokens before, of packed sequences

  Unit(const Attention& args, int64_t b, int64_t g)
      : Unit(args, b, g, g * (args.heads / args.groups), args.heads / args.groups) {}
  // `n` query heads of the group, from head h.
  Unit(const Attention& args, int64_t b, int64_t g, int64_t h, int64_t n)
      : a(args), batch(b), head(h), group(g), group_size(n) {
    first_query = a.starts_q ? a.starts_q[b] : 0;
    first_key = a.starts_k ? a.starts_k[b] : 0;
    queries = a.starts_q ? a.starts_q[b + 1] - first_query : a.queries;
    keys = a.starts_k ? a.starts_k[b + 1] - first_key : a.keys;
    rows = queries * group_size;
  }

  template <class Q = T>
  QueryRows<Q> query_rows(const Attention::Heads& x) const {
    return {(Q*)x.data + batch * x.batch + head * x.head + first_query * x.token, x.head, x.token, group_size, rows};
  }
  StridedRows<T> key_rows(const Attention::Heads& x) const {
    return {(T*)x.data + batch * x.batch + group * x.head + first_key * x.token, x.token, keys};
  }
  int64_t lse_at(int64_t r) const {
    return batch * a.lse_batch + (head + r % group_size) * a.lse_head + first_query + r / group_size;
  }
};

// The keys that a row sees: [0, prefix) and [low, high), less what a mask hides.
struct Seen {
  int64_t prefix, low, high;
  int64_t begin() const { return prefix > 0 ? 0 : low; }
  int64_t end() const { return high > prefix ? high : prefix; }
};

template <class T>
BK_INLINE Seen seen(const Unit<T>& u, int64_t row) {
  if (row >= u.rows) return {0, 0, 0};
  const Attention& a = u.a;
  int64_t at = row / u.group_size + u.keys - u.queries;
  int64_t low = a.left < 0 || at < a.left ? 0 : at - a.left;
  int64_t high = a.right < 0 || at + a.right + 1 > u.keys ? u.keys : at + a.right + 1;
  if (high <= low) low = high = 0;
  int64_t prefix = a.prefix ? a.prefix[u.batch] : 0;
  prefix = prefix < 0 ? 0 : prefix > u.keys ? u.keys : prefix;
  return {prefix, low, high};
}

template <class T>
BK_INLINE const uint8_t* mask_row(const Unit<T>& u, int64_t row) {
  const Attention::Scores& m = u.a.mask;
  return (const uint8_t*)m.data + u.batch * m.batch + (u.head + row % u.group_size) * m.head +
         row / u.group_size * m.query;
}

struct Columns {
  int64_t begin, end;
};

// The keys of [from, to) that some row of [begin, end) sees. A dense mask only shrinks the range from its ends.
template <class T>
Columns seen_by(const Unit<T>& u, int64_t begin, int64_t end, int64_t from, int64_t to) {
  int64_t low = to, high = from;
  if (end > u.rows) end = u.rows;
  if (begin >= end) return {from, from};
  if (!u.a.mask.data) {  // both ends of what a row sees grow with its number
    int64_t first = seen(u, begin).begin(), last = seen(u, end - 1).end();
    low = first > from ? first : from, high = last < to ? last : to;
    return low < high ? Columns{low, high} : Columns{from, from};
  }
  for (int64_t r = begin; r < end; ++r) {
    Seen s = seen(u, r);
    int64_t l = s.begin() > from ? s.begin() : from, h = s.end() < to ? s.end() : to;
    if (l >= h) continue;
    const uint8_t* mask = mask_row(u, r);
    int64_t step = u.a.mask.key;
    while (l < h && l < low && !mask[l * step]) ++l;
    while (h > l && h > high && !mask[(h - 1) * step]) --h;
    if (l >= h) continue;
    low = l < low ? l : low;
    high = h > high ? h : high;
  }
  if (low >= high) return {from, from};
  return {low, high};
}

// What is known of the 32 rows of a row block.
template <class T>
struct RowBlock {
  const Unit<T>& u;
  int64_t row;         // the first
  int64_t key;         // of column 0
  int64_t begin, end;  // columns in use, multiples of 32
};

BK_INLINE void fill(float* row, int64_t from, int64_t to, float value) {
  for (int64_t i = from; i < to; ++i) row[i] = value;
}

// Whether scores are products times one positive factor, but for the keys that are hidden.
BK_INLINE bool plain(const Attention& a) {
  return !a.bias.data && !a.mask.data && !a.alibi && a.softcap == 0 && a.scale > 0;
}

// Whether all 32 rows see all columns in use, but for what a mask hides.
template <class T>
BK_INLINE bool sees_all(const RowBlock<T>& s) {
  if (s.row + kSide > s.u.rows) return false;
  return seen(s.u, s.row + kSide - 1).low <= s.key + s.begin && seen(s.u, s.row).high >= s.key + s.end;
}

// Hides from a row what it does not see, in columns [begin, end) of which column 0 is `key`.
template <class T>
BK_INLINE void hide(const RowBlock<T>& s, int r, float* x) {
  Seen n = seen(s.u, s.row + r);
  int64_t low = n.low - s.key, high = n.high - s.key, prefix = n.prefix - s.key;
  if (prefix <= s.begin && low <= s.begin && high >= s.end) return;
  auto inside = [&](int64_t c) { return c < s.begin ? s.begin : c > s.end ? s.end : c; };
  int64_t first = inside(prefix);
  fill(x, first, inside(low < prefix ? prefix : low), -kInfinity);
  int64_t last = high > prefix ? high : prefix;
  fill(x, inside(last), s.end, -kInfinity);
}

template <class B>
BK_INLINE vf scores_at(const B* row, int64_t step, int64_t j, int64_t n) {
  if (step == 1) return n >= W ? load(row + j) : load(row + j, n);
  if (step == 0) return splat(load(row, 1)[0]);
  vf v{};
  for (int64_t i = 0; i < W && i < n; ++i) v[i] = load(row + (j + i) * step, 1)[0];
  return v;
}

// Turns the products of a row into scores in base 2, in place, by every option but the window. `slope` gets the
// derivative of the softcap, where backward needs it.
template <class T>
void adjust(const RowBlock<T>& s, int r, float* x, float* slope) {
  const Unit<T>& u = s.u;
  const Attention& a = u.a;
  int64_t row = s.row + r, query = row / u.group_size, head = u.head + row % u.group_size;
  if (slope) fill(slope, s.begin, s.end, 0.0f);
  if (row >= u.rows) return fill(x, s.begin, s.end, -kInfinity);
  const Attention::Scores& b = a.bias;
  const char* bias =
      b.data ? (const char*)b.data + (u.batch * b.batch + head * b.head + query * b.query) * size_of(a.bias_type)
             : nullptr;
  const uint8_t* mask = a.mask.data ? mask_row(u, row) : nullptr;
  float distance = a.alibi ? -a.alibi[head] : 0, cap = a.softcap, inverse = cap > 0 ? a.scale / cap : 0;
  int64_t at = query + u.keys - u.queries;
  vf lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t c = s.begin; c < s.end; c += W) {
    int64_t j = s.key + c, n = u.keys - j;
    if (n <= 0) break;  // hidden later
    vf v = load(x + c);
    if (cap > 0) {
      vf t = vtanh(v * inverse);
      v = t * cap;
      if (slope) store(slope + c, 1.0f - t * t);
    } else {
      v *= a.scale;
    }
    if (bias)
      v += by_type(a.bias_type, [&](auto t) __attribute__((always_inline)) {
        return scores_at((const decltype(t)*)bias, b.key, j, n);
      });
    if (a.alibi) v += vabs(lane + (float)(j - at)) * distance;
    if (mask)
      for (int i = 0; i < W && i < n; ++i)
        if (!mask[(j + i) * a.mask.key]) v[i] = -kInfinity;
    // Masks of the least number hide nothing where they are all there is: they must not become infinite.
    store(x + c, select_less(splat(-kInfinity), v, vmax(splat(-kLargest), v * kLog2e), v));
  }
}

template <class T>
BK_INLINE float dot(const T* x, const T* y, int64_t n) {
  vf sum{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += load(x + i) * load(y + i);
  if (i < n) sum += load(x + i, n - i) * load(y + i, n - i);
  return BK_ISA::sum(sum);
}
BK_INLINE float dot(const float* x, const float* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (double)x[i] * y[i];
  return (float)sum;
}

// What backward needs of rows [begin, end): lse in base 2 and what rounding took from it, and delta, by which a score's
// gradient is less than that of its weight. For rows that see nothing, and those beyond the last, all weights become
// zero.
template <class T>
void row_sums(const Unit<T>& u, int64_t begin, int64_t end, float* lse, float* rest, float* delta) {
  const Attention& a = u.a;
  auto grads = u.query_rows(a.grad), outs = u.query_rows(a.out);
  for (int64_t r = begin; r < end; ++r, ++lse, ++rest, ++delta) {
    *lse = kInfinity, *rest = *delta = 0;
    if (r >= u.rows) continue;
    int64_t at = u.lse_at(r);
    *delta = dot(grads.get(grads, r), outs.get(outs, r), a.dv);
    if (a.grad_lse) *delta -= a.grad_lse[at];
    // Of rows that see masks of the least number alone, the weights are lost in the rounding of the logsumexp.
    if (a.lse[at] < -1e37f) continue;
    double exact = (double)a.lse[at] * kLog2e;
    *lse = (float)exact, *rest = (float)(exact - *lse);
  }
}

// Philox-4x32-10 on 16 counters at once: words[w][i] is word w of the counter (first + i, c1, c2, 0).
BK_INLINE void philox16(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t (*words)[16]) {
  uint32_t* x0 = words[0];
  uint32_t* x1 = words[1];
  uint32_t* x2 = words[2];
  uint32_t* x3 = words[3];
  for (int i = 0; i < 16; ++i) x0[i] = first + i, x1[i] = c1, x2[i] = c2, x3[i] = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      uint64_t a = (uint64_t)x0[i] * 0xD2511F53u, b = (uint64_t)x2[i] * 0xCD9E8D57u;
      x0[i] = (uint32_t)(b >> 32) ^ x1[i] ^ k0;
      x1[i] = (uint32_t)b;
      x2[i] = (uint32_t)(a >> 32) ^ x3[i] ^ k1;
      x3[i] = (uint32_t)a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 1 where dropout keeps a column of the row, 0 where it drops it; bigkernels/ops/_attention.py has the definition.
template <class T>
void kept(const RowBlock<T>& s, int r, float* keep) {
  const Unit<T>& u = s.u;
  int64_t row = s.row + r, head = u.head + row % u.group_size;
  uint32_t words[4][16];
  for (int64_t c = s.begin / 64 * 64; c < s.end; c += 64) {
    philox16(u.a.seed, (uint32_t)((s.key + c) / 64 * 16), (uint32_t)(row / u.group_size),
             (uint32_t)(u.batch * u.a.heads + head), words);
    const uint32_t* word = words[0];
    for (int i = 0; i < 64; ++i) keep[c + i] = word[i] >= u.a.threshold ? 1.0f : 0.0f;
  }
}

// Packs tokens [from, from + 32 * count) of a matrix with `columns` columns: block (j, i) of token block j and column
// block i goes to `tokens_last ? i * count + j : j * blocks(columns) + i`.
template <class F, class T, class Row, class Emit>
BK_INLINE void each_block(const Row& rows, int64_t from, int64_t count, int64_t columns, const Emit& emit) {
  alignas(64) typename F::Element staged[F::kBlock];
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < blocks(columns); ++i) {
      F::template stage<T>(staged, rows, from + j * kSide, i * kSide, columns);
      emit(j, i, staged);
    }
}

// Asks for rows [from, to) of a matrix, into the second-level cache: they lie pages apart, where the machine's own
// prefetcher does not follow.
template <class T>
BK_INLINE void prefetch_rows(const StridedRows<T>& rows, int64_t from, int64_t to, int64_t columns) {
  if (to > rows.count) to = rows.count;
  for (int64_t r = from; r < to; ++r) {
    const char* line = (const char*)(rows.first + r * rows.stride);
    for (int64_t b = 0; b < columns * (int64_t)sizeof(T); b += 64) __builtin_prefetch(line + b, 0, 2);
  }
}

// Packs row blocks as a left operand whose depth is the columns: block (j, i) at j * blocks(columns) + i.
template <class F, class T, class Row>
BK_INLINE void pack_left(const Row& rows, int64_t from, int64_t count, int64_t columns, typename F::Element* to) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < blocks(columns); ++i, to += F::kBlock)
      F::template stage<T>(to, rows, from + j * kSide, i * kSide, columns);
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
