// Attention of few queries over many keys. Keys and values come from memory once: for a block of keys, head by head,
// all rows that read the head use it, while the next block is asked for in the order of its addresses.
#include "decode_bytes.h"
#include "decode_tiles.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// ---- from products to weights ---------------------------------------------------------------------------------------

BK_INLINE void fill(float* s, int64_t from, int64_t to, float value) {
  for (int64_t i = from; i < to; ++i) s[i] = value;
}

template <class B>
BK_INLINE void add_bias(float* s, const B* bias, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    vf v;
    if (step == 1 && count - i >= W) {
      v = load(bias + i);
    } else {
      for (int j = 0; j < W; ++j) v[j] = i + j < count ? load(bias + (i + j) * step, 1)[0] : 0.0f;
    }
    store(s + i, load(s + i) + v);
  }
}

// Whether scores are products times one factor, but for the keys that are hidden.
BK_INLINE bool plain(const DecodeAttention& a) { return !a.bias.data && !a.mask.data && !a.alibi && a.softcap == 0; }

// The keys that a query sees are [0, prefix) and [low, high), here of `count` keys and counted from the first of them.
struct Seen {
  int64_t position, prefix, low, high;

  Seen(const DecodeAttention& a, const DecodePart& p, int64_t key, int64_t count, int64_t query) {
    int64_t length = a.lengths ? a.lengths[p.batch] : a.keys;
    position = query + length - a.queries - key;
    prefix = inside(a.prefix ? a.prefix[p.batch] - key : 0, count);
    low = inside(a.left < 0 ? 0 : position - a.left, count);
    high = inside(a.right < 0 ? count : position + a.right + 1, count);
  }
  bool all(int64_t count) const { return prefix == count || (low == 0 && high == count); }

 private:
  static int64_t inside(int64_t i, int64_t count) { return i < 0 ? 0 : i > count ? count : i; }
};

// Scores of a row from its products, in place; -inf where it does not see a key, and in the lanes after the last one.
void finish_scores(const DecodeAttention& a, const DecodePart& p, const Block& b, const Seen& seen, int64_t query,
                   int64_t head, const float* k_scale, float* s) {
  float slope = a.alibi ? a.alibi[head] : 0, inverse = a.softcap > 0 ? 1 / a.softcap : 0;
  vf lanes;
  for (int i = 0; i < W; ++i) lanes[i] = (float)i;
  for (int64_t i = 0; i < b.count; i += W) {
    vf x = load(s + i) * a.scale;
    if (k_scale) x = x * load(k_scale + i);
    if (a.softcap > 0) x = a.softcap * vtanh(x * inverse);
    if (a.alibi) x = x - slope * vabs(lanes + (float)(i - seen.position));
    store(s + i, x);
  }
  if (const Attention::Scores& m = a.bias; m.data) {
    int64_t at = p.batch * m.batch + head * m.head + query * m.query + b.key * m.key;
    by_type(a.bias_type, [&](auto t) { add_bias(s, (const decltype(t)*)m.data + at, m.key, b.count); });
  }
  if (const Attention::Scores& m = a.mask; m.data) {
    const uint8_t* shown = (const uint8_t*)m.data + p.batch * m.batch + head * m.head + query * m.query + b.key * m.key;
    for (int64_t i = 0; i < b.count; ++i) s[i] = shown[i * m.key] ? s[i] : -kInfinity;
  }
  fill(s, seen.prefix, seen.low, -kInfinity);
  fill(s, seen.high > seen.prefix ? seen.high : seen.prefix, padded(b.count, W), -kInfinity);
}

// Weights of row r from `by` times s, and in `factor` what its sums so far are to be multiplied with. The shift does
// not become NaN, so that a NaN shows in what it is a part of.
template <class E>
BK_INLINE void weights(const Layout& n, const State& state, int64_t r, int64_t count, float by, const float* v_scale,
                       float* s, float* w, float* factor) {
  float* row = s + r * kKeys;
  vf most = splat(-kInfinity);
  for (int64_t i = 0; i < count; i += W) most = vmax(load(row + i) * by, most);
  vf total = load(state.total + r * W);
  float before = state.most[r];
  factor[r] = 1;
  if (any_above(most, before + kSlack)) {
    float now = max(most);
    state.most[r] = now;
    factor[r] = vexp_nonpositive(splat(before - now))[0];
    total = total * factor[r];
  }
  float shift = state.most[r] > -kInfinity ? state.most[r] : 0;
  for (int64_t i = 0; i < count; i += W) {
    vf p = vexp_softmax(load(row + i) * by - shift);
    total += p;
    if (v_scale) p = p * load(v_scale + i);
    E::put_weights(n, s, w, r, i, p);
  }
  store(state.total + r * W, total);
}

// ---- in and out -----------------------------------------------------------------------------------------------------

// The type of q and out.
BK_INLINE Type outside(const DecodeAttention& a) { return a.floats ? Type::f32 : a.type; }

template <class E, class T>
void read_queries(const DecodeAttention& a, const DecodePart& p, const Layout& n, int64_t group, char* q) {
  for (int64_t r = 0; r < n.rows; ++r) {
    const T* from = (const T*)a.q.data + p.batch * a.q.batch + (group * n.group_size + r % n.group_size) * a.q.head +
                    (p.first_query + r / n.group_size) * a.q.token;
    int64_t e = 0;
    for (; e + W <= a.d; e += W) E::put_query(n, q, r, e, load(from + e));
    if (e < a.d) E::put_query(n, q, r, e, load(from + e, a.d - e)), e += W;
    for (; e < n.d; e += W) E::put_query(n, q, r, e, vf{});
  }
}

// Queries [begin, end) of a head from what the parts of its keys add up to.
template <class E, class T>
void write_rows(const DecodeAttention& a, const DecodePart* parts, int64_t count, const Layout& n, int64_t g,
                int64_t begin, int64_t end) {
  float factor[kDecodeParts];
  const DecodePart& p = *parts;
  for (int64_t r = begin * n.group_size; r < end * n.group_size; ++r) {
    int64_t head = (p.group + g) * n.group_size + r % n.group_size, query = p.first_query + r / n.group_size;
    float sink = a.sinks ? a.sinks[head] : -kInfinity, most = sink;
    for (int64_t i = 0; i < count; ++i) {
      float one = State(n, parts[i].state, g).most[r];
      most = one > most ? one : most;
    }
    float base = most > -kInfinity ? most : 0, total = a.sinks ? vexp_nonpositive(splat(sink - base))[0] : 0;
    for (int64_t i = 0; i < count; ++i) {
      State part(n, parts[i].state, g);
      factor[i] = vexp_nonpositive(splat(part.most[r] - base))[0];
      total += sum(load(part.total + r * W)) * factor[i];
    }
    float by = total == 0 ? 0 : 1 / total;
    if (a.lse)
      a.lse[p.batch * a.lse_batch + head * a.lse_head + query] = total == 0 ? -kInfinity : most + __builtin_logf(total);
    T* to = (T*)a.out.data + p.batch * a.out.batch + head * a.out.head + query * a.out.token;
    for (int64_t e = 0; e < a.dv; e += E::kVectors * W) {
      vf x[E::kVectors] = {}, one[E::kVectors];
      for (int64_t i = 0; i < count; ++i) {
        E::row(n, State(n, parts[i].state, g).acc, r, e, one);
        for (int v = 0; v < E::kVectors; ++v) x[v] += one[v] * factor[i];
      }
      for (int i = 0; i < E::kVectors; ++i) {
        int64_t left = a.dv - e - i * W;
        if (left >= W)
          store(to + e + i * W, x[i] * by);
        else if (left > 0)
          store(to + e + i * W, x[i] * by, left);
      }
    }
  }
}

template <class E>
void write_out(const DecodeAttention& a, const DecodePart* parts, int64_t count, const Layout& n, int64_t begin,
               int64_t end) {
  for (int64_t g = 0; g < parts->groups; ++g) {
    switch (outside(a)) {
      case Type::f32: write_rows<E, float>(a, parts, count, n, g, begin, end); break;
      case Type::bf16: write_rows<E, bf16>(a, parts, count, n, g, begin, end); break;
      case Type::f16: write_rows<E, f16>(a, parts, count, n, g, begin, end); break;
    }
  }
}

// ---- parts ----------------------------------------------------------------------------------------------------------

template <class E>
int64_t workspace_of(const Layout& n, int64_t groups) {
  return groups * n.q_head + n.scores() + n.weights + n.staging +
         (n.padded_rows + 2 * kKeys + groups * n.state()) * sizeof(float);
}

// Whether all rows see a whole block of keys at one distance from each other, scales of int8 side by side.
bool in_line(const DecodeAttention& a) {
  return plain(a) && !a.block_table && a.k.token && a.v.token &&
         (!a.int8 || (a.k_scale.token == 1 && a.v_scale.token == 1));
}
bool all_seen(const DecodeAttention& a, const DecodePart& p, int64_t key, int64_t count) {
  return Seen(a, p, key, count, p.first_query).all(count) &&
         Seen(a, p, key, count, p.first_query + p.queries - 1).all(count);
}

constexpr int64_t kFewRows = 4;        // of a head, that are multiplied at once
constexpr int64_t kAheadBytes = 1024;  // of keys and of values: further on, the processor's own prefetcher stays behind

// `count` keys of head g of a part, whole blocks from `key` on.
template <class E>
void attend_line(const DecodeAttention& a, const DecodePart& p, const Layout& n, const char* q, int64_t g, int64_t key,
                 int64_t count) {
  constexpr int64_t size = sizeof(typename E::Cache);
  auto line = [&](const Attention::Heads& x, const Attention::Heads& scales, int64_t elements) {
    const int64_t by = x.token * size;
    const char* first = (const char*)x.data + (p.batch * x.batch + (p.group + g) * x.head) * size + key * by;
    const float* scale = nullptr;
    if (a.int8)
      scale = (const float*)scales.data + p.batch * scales.batch + (p.group + g) * scales.head + key * scales.token;
    // Of several heads each rests while the others are read, and is asked for a block before.
    const int64_t ahead = p.groups > 1 ? kKeys : padded(kAheadBytes, elements * size) / (elements * size);
    return Line{first, first + ahead * by, by, scale};
  };
  const State state(n, p.state, g);
  const Line keys = line(a.k, a.k_scale, a.d), values = line(a.v, a.v_scale, a.dv);
  if (a.int8 && a.type != Type::f32 && by_bytes(a.d, a.dv) && unsigned_scales(values.scale, count))
    byte_block(n, q, state, keys, values, count, a.d, a.dv, a.scale);
  else
    line_block<typename E::Cache>(n, q, state, keys, values, count, a.d, a.dv, a.scale);
}

// Where the parts of a head's work lie in a thread's memory. What a line needs comes first and together: each page that
// is touched between two lines takes the place of a stream that the processor's prefetcher follows.
struct Workspace {
  char *q, *staging;
  float *state, *s, *w, *factor, *k_scale, *v_scale;

  Workspace(const Layout& n, int64_t groups, char* at) {
    auto take = [&](int64_t bytes) { return at += bytes, at - bytes; };  // aligned while sizes are
    q = take(groups * n.q_head);
    state = (float*)take(groups * n.state() * sizeof(float));
    s = (float*)take(n.scores());
    w = (float*)take(n.weights);
    staging = take(n.staging);
    factor = (float*)take(n.padded_rows * sizeof(float));
    k_scale = (float*)take(kKeys * sizeof(float));
    v_scale = (float*)take(kKeys * sizeof(float));
  }
};

// Block by block, from key `begin` on; p.state is the workspace's.
template <class E>
__attribute__((noinline)) void attend_blocks(const DecodeAttention& a, const DecodePart& p, const Layout& n,
                                             const Workspace& m, int64_t begin) {
  constexpr int64_t size = sizeof(typename E::Cache);
  const int64_t k_head = a.k.head * size, v_head = a.v.head * size;
  const bool simple = plain(a), lines = E::kLines && in_line(a);
  Block blocks[2], *now = blocks, *next = blocks + 1;
  now->find(a, p, begin, size);
  if (now->count) E::begin(n);
  while (now->count) {
    next->find(a, p, now->key + kKeys, size);
    Ahead ahead(*next, p.groups, {next->k, k_head, padded(a.d * size, kLine) / kLine},
                {next->v, v_head, padded(a.dv * size, kLine) / kLine});
    const bool line = lines && now->count == kKeys && all_seen(a, p, now->key, kKeys);
    for (int64_t g = 0; g < p.groups; ++g) {
      const char* q = m.q + g * n.q_head;
      if constexpr (E::kLines)
        if (line) {
          attend_line<E>(a, p, n, q, g, now->key, kKeys);
          continue;
        }
      State state(n, p.state, g);
      E::scores(n, q, *now, g * k_head, a.d, m.s, m.staging, ahead);
      if (a.int8)
        for (int64_t t = 0; t < padded(now->count, W); ++t) {
          bool valid = t < now->count;
          m.k_scale[t] = valid ? now->k_scale[t][g * a.k_scale.head] : 0;
          m.v_scale[t] = valid ? now->v_scale[t][g * a.v_scale.head] : 0;
        }
      Ahead::begin(ahead, n.rows);
      for (int64_t i = 0, r = 0; i < p.queries; ++i) {
        Seen seen(a, p, now->key, now->count, p.first_query + i);
        bool as_it_is = simple && !a.int8 && seen.all(now->count) && now->count % W == 0;
        for (int64_t h = 0; h < n.group_size; ++h, ++r) {
          Ahead::step(ahead);
          if (!as_it_is)
            finish_scores(a, p, *now, seen, p.first_query + i, (p.group + g) * n.group_size + h,
                          a.int8 ? m.k_scale : nullptr, m.s + r * kKeys);
          weights<E>(n, state, r, now->count, as_it_is ? a.scale : 1, a.int8 ? m.v_scale : nullptr, m.s, m.w, m.factor);
        }
      }
      E::weigh(n, m.s, m.w, *now, g * v_head, a.dv, state.acc, m.factor, m.staging, ahead);
    }
    Block* done = now;
    now = next, next = done;
    if (!now->count) E::end();
  }
}

template <class E>
void attend(const DecodeAttention& a, DecodePart p, char* workspace) {
  const Layout n = E::layout(a, p.queries);
  const Workspace m(n, p.groups, workspace);
  float* parted = p.state;  // gets the sums when they are final: another thread may have made and read them before
  p.state = m.state;
  for (int64_t g = 0; g < p.groups; ++g) {
    char* head = m.q + g * n.q_head;
    switch (outside(a)) {
      case Type::f32: read_queries<E, float>(a, p, n, p.group + g, head); break;
      case Type::bf16: read_queries<E, bf16>(a, p, n, p.group + g, head); break;
      case Type::f16: read_queries<E, f16>(a, p, n, p.group + g, head); break;
    }
    State state(n, p.state, g);
    fill(state.acc, 0, n.acc_rows * n.acc_width, 0);
    fill(state.most, 0, n.padded_rows, -kInfinity);
    fill(state.total, 0, n.total_rows * W, 0);
  }
  int64_t begin = p.begin;
  if constexpr (E::kLines)
    if (p.groups == 1 && in_line(a)) {
      // Of few rows all blocks in one go; those of many would read what is out of the caches again.
      const int64_t count = (p.end - begin) / kKeys * kKeys, step = n.rows <= kFewRows ? count : kKeys;
      if (count > 0 && all_seen(a, p, begin, count))
        for (const int64_t end = begin + count; begin < end; begin += step)
          attend_line<E>(a, p, n, m.q, 0, begin, step);
    }
  if (begin < p.end) attend_blocks<E>(a, p, n, m, begin);
  if (!parted) return write_out<E>(a, &p, 1, n, 0, p.queries);
  __builtin_memcpy(parted, p.state, p.groups * n.state() * sizeof(float));
}

// run(the class of products that fits the call)
template <class Run>
BK_INLINE auto with_products(const DecodeAttention& a, Run run) {
#if defined(__AMX_BF16__)
  if (a.type == Type::bf16) return a.int8 ? run(Tiles<int8_t>()) : run(Tiles<bf16>());
#endif
  if (a.int8) return run(Vectors<int8_t>());
  return by_type(a.type, [&](auto t) { return run(Vectors<decltype(t)>()); });
}

}  // namespace

DecodeSizes decode_sizes(const DecodeAttention& a, int64_t groups, int64_t queries) {
  return with_products(a, [&](auto e) {
    Layout n = decltype(e)::layout(a, queries);
    return DecodeSizes{workspace_of<decltype(e)>(n, groups), groups * n.state()};
  });
}

void decode_attention(const DecodeAttention& a, const DecodePart* parts, int64_t count, void* workspace) {
  with_products(a, [&](auto e) {
    for (int64_t i = 0; i < count; ++i) attend<decltype(e)>(a, parts[i], (char*)workspace);
  });
}

void decode_merge(const DecodeAttention& a, const DecodePart* parts, int64_t count, int64_t begin, int64_t end) {
  with_products(
      a, [&](auto e) { write_out<decltype(e)>(a, parts, count, decltype(e)::layout(a, parts->queries), begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
