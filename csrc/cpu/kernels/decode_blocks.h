// Where the keys and values of decode attention are, in blocks, and what a part of the work keeps of them.
#pragma once
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kKeys = 64;  // a block
constexpr int64_t kLine = 64;  // bytes

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The memory of a part. Rows are those of one head of the cache: its query heads, times the new tokens.
struct Layout {
  int64_t group_size, rows, padded_rows;
  int64_t d, dv;                            // padded
  int64_t acc_rows, acc_width, total_rows;  // sums of weights times values: row m is of row m % rows
  int64_t q_head, q_row, weights, staging;  // bytes

  Layout(const DecodeAttention& a, int64_t queries, int64_t step) {
    group_size = a.heads / a.groups;
    rows = queries * group_size;
    padded_rows = total_rows = padded(rows, 16);
    d = padded(a.d, step), dv = padded(a.dv, step);
  }
  int64_t state() const { return padded(acc_rows * acc_width + padded_rows + total_rows * W, 16); }  // floats a head
  int64_t scores() const { return padded_rows * kKeys * sizeof(float); }
};

// Of one head: sums of weights times values, about the largest score, and sums of the weights, W of them a row.
struct State {
  float *acc, *most, *total;
  State(const Layout& n, float* states, int64_t head) {
    acc = states + head * n.state();
    most = acc + n.acc_rows * n.acc_width;
    total = most + n.padded_rows;
  }
};

// Up to kKeys keys and where they are, for the first head of a part.
struct Block {
  int64_t key, count;
  const char *k[kKeys + 1], *v[kKeys + 1];  // what is after the last key repeats it
  const float *k_scale[kKeys], *v_scale[kKeys];
  // The distance of neighbours among 16 keys; 0 where it is not the same for all of them.
  int64_t k_step[kKeys / 16], v_step[kKeys / 16];

  void find(const DecodeAttention& a, const DecodePart& p, int64_t from, int64_t size) {
    key = from;
    count = p.end - from < kKeys ? p.end - from : kKeys;
    if (count < 0) count = 0;
    if (!count) return;
    if (!a.block_table) return find_in_line(a, p, size);
    const int32_t* table = a.block_table ? a.block_table + p.batch * a.table_stride : nullptr;
    int64_t batch = p.batch, token = from, page = 0;
    if (table) page = from / a.page, token = from % a.page, batch = table[page];
    for (int64_t t = 0; t < count; ++t, ++token) {
      if (table && token == a.page) token = 0, batch = table[++page];
      auto at = [&](const Attention::Heads& x) { return batch * x.batch + token * x.token + p.group * x.head; };
      k[t] = (const char*)a.k.data + at(a.k) * size;
      v[t] = (const char*)a.v.data + at(a.v) * size;
      if (a.int8) {
        k_scale[t] = (const float*)a.k_scale.data + at(a.k_scale);
        v_scale[t] = (const float*)a.v_scale.data + at(a.v_scale);
      }
    }
    repeat_last();
    for (int64_t t = 0; t < count; t += 16) {
      k_step[t / 16] = t + 16 <= count ? step(k + t) : 0;
      v_step[t / 16] = t + 16 <= count ? step(v + t) : 0;
    }
  }

 private:
  void repeat_last() {
    for (int64_t t = count; t <= kKeys; ++t) k[t] = k[count - 1], v[t] = v[count - 1];
  }
  // Keys that are not in pages: by vectors of addresses.
  void find_in_line(const DecodeAttention& a, const DecodePart& p, int64_t size) {
    auto at = [&](const Attention::Heads& x) { return (p.batch * x.batch + key * x.token + p.group * x.head) * size; };
    const char *first_k = (const char*)a.k.data + at(a.k), *first_v = (const char*)a.v.data + at(a.v);
    const int64_t by_k = a.k.token * size, by_v = a.v.token * size;
    for (int64_t t = 0; a.int8 && t < count; ++t) {
      auto scale = [&](const Attention::Heads& x) {
        return (const float*)x.data + p.batch * x.batch + (key + t) * x.token + p.group * x.head;
      };
      k_scale[t] = scale(a.k_scale), v_scale[t] = scale(a.v_scale);
    }
    for (int64_t t = 0; t <= kKeys; ++t) k[t] = first_k + t * by_k, v[t] = first_v + t * by_v;
    repeat_last();
    for (int64_t t = 0; t < count; t += 16) {
      k_step[t / 16] = t + 16 <= count ? by_k : 0;
      v_step[t / 16] = t + 16 <= count ? by_v : 0;
    }
  }
  static int64_t step(const char* const* tokens) {
    int64_t step = tokens[1] - tokens[0];
    for (int i = 2; i < 16; ++i)
      if (tokens[i] - tokens[i - 1] != step) return 0;
    return step;
  }
};

// Keys or values from `first` on, each `by` bytes after the one before, and what is asked for meanwhile.
struct Line {
  const char *first, *ahead;
  int64_t by;
  const float* scale;  // of an int8 cache

  void move(int64_t keys) {
    first += keys * by, ahead += keys * by;
    if (scale) scale += keys;
  }
};

// Asks for a line into the second-level cache: the first has fewer requests under way than the memory needs.
BK_INLINE void ask(const char* p) { __builtin_prefetch(p, 0, 2); }

// Asks for a block to come in the order of its addresses: tokens with all their heads. A phase of work on a head asks
// for its share a few lines at a time, so that the memory is never idle nor its queue full.
struct Ahead {
  struct Stream {
    const char* const* tokens;
    int64_t head_bytes, lines;  // lines a head
  };
  Stream streams[2];
  int64_t count, heads;
  int64_t token = 0, stream = 0, head = 0, lines_a_step = 0, owed = 0;

  Ahead(const Block& b, int64_t heads_, Stream k, Stream v) : streams{k, v}, count(b.count), heads(heads_) {}
  // One of three phases of a head begins, and will call step() so many times.
  BK_INLINE void begin(Ahead& a, int64_t steps) {
    int64_t share = (a.count * (a.streams[0].lines + a.streams[1].lines) + 2) / 3;
    a.lines_a_step = steps > 0 ? (share + steps - 1) / steps : 0;
  }
  // Whole heads of tokens: finding out for each line where it is would take longer than reading it.
  BK_INLINE void step(Ahead& a) {
    for (a.owed += a.lines_a_step; a.owed > 0 && a.token < a.count;) {
      const Stream& s = a.streams[a.stream];
      const char* from = s.tokens[a.token] + a.head * s.head_bytes;
      // Into the second level: a block of all heads is larger than the first.
      for (int64_t i = 0; i < s.lines; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
      a.owed -= s.lines;
      if (++a.head < a.heads) continue;
      a.head = 0, a.token += a.stream, a.stream ^= 1;
    }
  }
};

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
