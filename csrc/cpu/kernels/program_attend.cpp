// Attention of a program's record over the cache: few tokens as decode attention, with the keys cut into parts, many as
// attention's forward. How keys are cut depends on a record's sizes alone, so that results do not depend on the
// threads; where rows are, in multiples of 32, changes none.
#include <bigkernels/program.h>
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {

DecodeSizes decode_sizes(const DecodeAttention&, int64_t groups, int64_t queries);
void decode_attention(const DecodeAttention&, const DecodePart*, int64_t count, void*);
void decode_merge(const DecodeAttention&, const DecodePart*, int64_t count, int64_t begin, int64_t end);
void attention_fwd(const Attention&, const AttentionTask&, void*);
int64_t attention_fwd_workspace(const Attention&, int64_t);

namespace {

constexpr int64_t kFewRows = 40;          // of a head, up to which keys are read as they lie, and not packed
constexpr int64_t kRowsOfHead = 128;      // that share one pass over the keys of a head
constexpr int64_t kBlock = 64;            // keys: where they may be cut
constexpr int64_t kPartBytes = 64 << 10;  // of keys and values, at least
constexpr int64_t kTasks = 16;            // that are enough: each begins a stream of its own, 1.4 us later
constexpr int64_t kMostRows = 512;        // of a range of many: their sums stay in a core's own cache

int64_t ceiling(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One record in one call: what its sizes say.
struct Cut {
  const AttendRecord& record;
  const Run& run;
  const LayerCache& cache;
  int64_t group_size, queries, blocks;  // few tokens: of a chunk, and how many of them a sequence has
  bool few;

  Cut(const AttendRecord& r, const Run& u) : record(r), run(u), cache(u.caches[r.layer]) {
    group_size = r.heads / r.groups;
    few = run.tokens <= 2 || run.tokens * group_size <= kFewRows;
    queries = kRowsOfHead / group_size < 1 ? 1 : smaller(kRowsOfHead / group_size, run.tokens);
    blocks = ceiling(run.tokens, queries);
  }
  int64_t key_bytes() const { return (record.d + record.dv) * (cache.bits == 8 ? 1 : size_of(cache.type)); }
  // The first slot that queries from `query` on of a sequence see.
  int64_t first_slot(int64_t batch, int64_t query) const {
    int64_t start = run.starts ? run.starts[batch] - (run.past - cache.held) : 0;
    int64_t low = record.window > 0 ? cache.held + query + 1 - record.window : 0;
    return larger(larger(start, low), 0);
  }
  int64_t most_keys() const {
    int64_t all = cache.held + run.tokens;
    return record.window > 0 ? smaller(all, record.window + queries - 1) : all;
  }
};

AttendPlan plan_of(const Cut& c, int64_t threads) {
  AttendPlan plan{};
  int64_t units = c.run.batch * c.record.groups;
  if (c.few) {
    units *= c.blocks;
    plan.rows = c.queries;
    int64_t keys = ceiling(larger(c.most_keys(), 1), kBlock) * kBlock;
    int64_t least = ceiling(kPartBytes, c.key_bytes());
    plan.keys = smaller(keys, ceiling(larger(least, keys * units / kTasks), kBlock) * kBlock);
    plan.keys = larger(plan.keys, ceiling(ceiling(keys, kDecodeParts), kBlock) * kBlock);
    plan.parts = ceiling(keys, plan.keys);
    plan.chunks = units * plan.parts;
  } else {
    // Keys are packed for each range of the rows: some ranges a thread, because they do not take the same time.
    int64_t rows = c.run.tokens * c.group_size, ranges = threads > 1 ? 6 * threads : 1;
    int64_t most = larger((int64_t{1} << 17) / larger(c.record.d, c.record.dv) / 32 * 32, 256);
    plan.rows = larger(ceiling(ceiling(rows * units, ranges), 32) * 32, 64);
    plan.rows = smaller(plan.rows, smaller(most, kMostRows));
    plan.keys = c.cache.held + c.run.tokens;
    plan.parts = 1;
    plan.chunks = units * ceiling(rows, plan.rows);
  }
  return plan;
}

constexpr int64_t kMostHeads = 1024;  // where there are sinks

// The record's arguments for one sequence, beginning with slot `first`.
struct Arguments : DecodeAttention {
  float sink[kMostHeads];

  Arguments(const Cut& c, float* const* v, const int32_t* width, int64_t batch, int64_t first) : DecodeAttention{} {
    const AttendRecord& r = c.record;
    const LayerCache& s = c.cache;
    const int64_t size = s.bits == 8 ? 1 : size_of(s.type), row = batch * c.run.tokens;
    q = {v[r.q] + row * width[r.q], 0, r.d, width[r.q]};
    out = {v[r.out] + row * width[r.out], 0, r.dv, width[r.out]};
    k = {(char*)s.k + (batch * s.k_batch + first * s.k_token) * size, 0, s.k_head, s.k_token};
    Attention::v = {(char*)s.v + (batch * s.v_batch + first * s.v_token) * size, 0, s.v_head, s.v_token};
    if (s.bits == 8) {
      int8 = true;
      k_scale = {s.k_scale + batch * s.scale_batch + first, 0, s.scale_head, 1};
      v_scale = {s.v_scale + batch * s.scale_batch + first, 0, s.scale_head, 1};
    }
    batches = 1, heads = r.heads, groups = r.groups, d = r.d, dv = r.dv;
    queries = c.run.tokens;
    keys = larger(s.held + c.run.tokens - first, 0);  // none: a sequence of padding
    left = r.window > 0 ? r.window - 1 : -1, right = 0;
    scale = r.scale, softcap = r.softcap;
    alibi = r.alibi;
    type = s.type, floats = true;
    sinks = r.sinks.data ? sinks_of(r) : nullptr;
  }

 private:
  const float* sinks_of(const AttendRecord& r) {
    if (r.sinks.type == Type::f32) return (const float*)r.sinks.data;
    for (int64_t h = 0; h < r.heads && h < kMostHeads; ++h)
      sink[h] =
          r.sinks.type == Type::bf16 ? load_one((const bf16*)r.sinks.data + h) : load_one((const f16*)r.sinks.data + h);
    return sink;
  }
};

// Sizes that do not depend on the sequence.
struct Shape : DecodeAttention {
  explicit Shape(const Cut& c) : DecodeAttention{} {
    heads = c.record.heads, groups = c.record.groups, d = c.record.d, dv = c.record.dv;
    type = c.cache.type, int8 = c.cache.bits == 8, floats = true;
  }
};

int64_t state_of(const Cut& c, const AttendPlan& plan) {
  return ceiling(decode_sizes(Shape(c), 1, plan.rows).state, 16) * 16;
}

// Part `part` of the keys that block `block` of the queries sees, for one head of the cache; counted from `first`.
DecodePart part_of(const Cut& c, const AttendPlan& plan, int64_t batch, int64_t first, int64_t group, int64_t block,
                   int64_t part) {
  int64_t query = block * plan.rows, count = smaller(plan.rows, c.run.tokens - query);
  int64_t low = c.first_slot(batch, query) - first, high = larger(c.cache.held + query + count - first, 0);
  DecodePart p{0, group, 1, query, count, low + part * plan.keys, low + (part + 1) * plan.keys, nullptr};
  p.end = smaller(p.end, high), p.begin = smaller(p.begin, p.end);
  return p;
}

}  // namespace

AttendPlan program_attend_plan(const AttendRecord& r, const Run& run, int64_t threads) {
  Cut c(r, run);
  AttendPlan plan = plan_of(c, threads);
  Shape shape(c);
  plan.workspace = c.few ? decode_sizes(shape, 1, plan.rows).workspace : attention_fwd_workspace(shape, plan.rows);
  plan.state = plan.parts > 1 ? plan.chunks * state_of(c, plan) : 0;
  return plan;
}

void program_attend(const AttendRecord& r, const Run& run, const AttendPlan& plan, int64_t chunk, float* const* v,
                    const int32_t* width, void* workspace) {
  Cut c(r, run);
  if (c.few) {
    int64_t part = chunk % plan.parts, unit = chunk / plan.parts, group = unit % r.groups;
    int64_t block = unit / r.groups % c.blocks, batch = unit / r.groups / c.blocks;
    int64_t first = c.first_slot(batch, 0);
    Arguments a(c, v, width, batch, first);
    DecodePart p = part_of(c, plan, batch, first, group, block, part);
    if (plan.parts > 1) p.state = v[r.state] + chunk * state_of(c, plan);
    return decode_attention(a, &p, 1, workspace);
  }
  // The last rows first: they see the most keys.
  int64_t rows = run.tokens * c.group_size, ranges = ceiling(rows, plan.rows), units = run.batch * r.groups;
  int64_t range = ranges - 1 - chunk / units, unit = chunk % units, batch = unit / r.groups;
  Arguments a(c, v, width, batch, c.first_slot(batch, 0));
  attention_fwd(a, {0, unit % r.groups, range * plan.rows, smaller((range + 1) * plan.rows, rows)}, workspace);
}

void program_attend_merge(const AttendRecord& r, const Run& run, const AttendPlan& plan, float* const* v,
                          const int32_t* width, int64_t begin, int64_t end) {
  Cut c(r, run);
  const int64_t state = state_of(c, plan);
  for (int64_t batch = begin / run.tokens; batch * run.tokens < end; ++batch) {
    int64_t from = larger(begin - batch * run.tokens, 0), to = smaller(end - batch * run.tokens, run.tokens);
    int64_t first = c.first_slot(batch, 0);
    Arguments a(c, v, width, batch, first);
    for (int64_t block = from / plan.rows; block * plan.rows < to; ++block)
      for (int64_t group = 0; group < r.groups; ++group) {
        DecodePart parts[kDecodeParts];
        int64_t chunk = ((batch * c.blocks + block) * r.groups + group) * plan.parts;
        for (int64_t i = 0; i < plan.parts; ++i) {
          parts[i] = part_of(c, plan, batch, first, group, block, i);
          parts[i].state = v[r.state] + (chunk + i) * state;
        }
        int64_t query = block * plan.rows;
        decode_merge(a, parts, plan.parts, larger(from - query, 0), smaller(to - query, parts->queries));
      }
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
