// Attention of an encoder's program: inside of each sequence of a run, over values and not over a cache.
#include <bigkernels/program.h>
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {

void attention_fwd(const Attention&, const AttentionTask&, void*);
int64_t attention_fwd_workspace(const Attention&, int64_t);

namespace {

constexpr int64_t kMostRows = 512;    // of one pass over the keys: their sums stay in a core's own cache
constexpr int64_t kMostHeads = 1024;  // where there are sinks

int64_t step_of(const HeadsOf& x) { return x.count > 1 ? x.column[1] - x.column[0] : 0; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

Attention shape_of(const MixRecord& r) {
  Attention a{};
  a.heads = r.heads, a.groups = r.groups, a.d = r.d, a.dv = r.dv;
  a.left = -1, a.right = r.causal ? 0 : -1;
  a.scale = r.scale, a.softcap = r.softcap, a.type = r.type, a.floats = true;
  return a;
}

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t rounded_bytes(const MixRecord& r, int64_t rows) {
  return r.type == Type::f32 ? 0 : padded(rows * r.d * 2) + padded(rows * r.dv * 2);
}

// Rows of a head, rounded, one after the other.
template <class T>
void round_head(const float* from, int64_t width, int64_t rows, int64_t d, T* to) {
  for (int64_t t = 0; t < rows; ++t, from += width, to += d) {
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + i, load(from + i));
    if (i < d) store(to + i, load(from + i, d - i), d - i);
  }
}

// Keys or values of a group in one sequence, as attention reads them.
Attention::Heads keys_of(const MixRecord& r, const HeadsOf& x, int64_t group, int64_t first, int64_t rows, int64_t d,
                         float* const* v, const int32_t* width, void* memory) {
  float* from = v[x.x] + first * width[x.x] + x.column[group];
  switch (r.type) {
    case Type::f32: return {from, 0, 0, width[x.x]};
    case Type::bf16: round_head(from, width[x.x], rows, d, (bf16*)memory); break;
    case Type::f16: round_head(from, width[x.x], rows, d, (f16*)memory); break;
  }
  return {memory, 0, 0, d};
}

}  // namespace

int64_t program_mix_workspace(const MixRecord& r, const Run& run) {
  int64_t most = 1;
  for (int64_t i = 0; i < run.sequences; ++i) {
    const int64_t rows = run.offsets[i + 1] - run.offsets[i];
    most = rows > most ? rows : most;
  }
  const int64_t rows = most * (r.heads / r.groups);
  return rounded_bytes(r, most) + padded(attention_fwd_workspace(shape_of(r), smaller(rows, kMostRows)));
}

void program_mix(const MixRecord& r, const Run& run, float* const* v, const int32_t* width, int64_t begin, int64_t end,
                 void* workspace) {
  Attention a = shape_of(r);
  float sinks[kMostHeads];
  if (r.sinks.data) {
    for (int64_t h = 0; h < r.heads; ++h)
      sinks[h] = r.sinks.type == Type::f32    ? ((const float*)r.sinks.data)[h]
                 : r.sinks.type == Type::bf16 ? load_one((const bf16*)r.sinks.data + h)
                                              : load_one((const f16*)r.sinks.data + h);
    a.sinks = sinks;
  }
  const ScoresTable* given = r.scores >= 0 ? run.scores + r.scores : nullptr;
  if (given && given->left >= 0) a.left = given->left;
  if (given && given->right >= 0 && !r.causal) a.right = given->right;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit / r.groups, group = unit % r.groups, size = r.heads / r.groups;
    const int64_t first = run.offsets[i], rows = run.offsets[i + 1] - first, head = group * size;
    // One group alone: its heads are heads 0 to `size` of what is pointed to.
    a.heads = size, a.groups = 1, a.queries = a.keys = rows;
    a.q = {v[r.q.x] + first * width[r.q.x] + r.q.column[head], 0, step_of(r.q), width[r.q.x]};
    a.out = {v[r.out] + first * width[r.out] + head * r.dv, 0, r.dv, width[r.out]};
    char* memory = (char*)workspace;
    a.k = keys_of(r, r.k, group, first, rows, r.d, v, width, memory);
    if (r.type != Type::f32) memory += padded(rows * r.d * 2);
    a.v = keys_of(r, r.v, group, first, rows, r.dv, v, width, memory);
    if (r.type != Type::f32) memory += padded(rows * r.dv * 2);
    if (r.sinks.data) a.sinks = sinks + head;
    if (given && given->mask)
      a.mask = {(const char*)given->mask + run.numbers[i] * given->mask_batch + head * given->mask_head, 0,
                given->mask_head, given->mask_query, given->mask_key};
    if (given && given->bias) {
      const int64_t at = run.numbers[i] * given->bias_batch + head * given->bias_head;
      a.bias = {(const char*)given->bias + at * size_of(given->type), 0, given->bias_head, given->bias_query,
                given->bias_key};
      a.bias_type = given->type;
    }
    for (int64_t row = 0; row < rows * size; row += kMostRows)
      attention_fwd(a, {0, 0, row, smaller(row + kMostRows, rows * size)}, memory);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
