#include "program_experts.h"

#include <algorithm>
#include <cstring>

namespace bigkernels {
namespace {

constexpr int64_t kTokens = 128;                         // of one expert that are multiplied at once
constexpr int64_t kRows = 16;                            // of a weight, at least
constexpr int64_t kColumns = 128;                        // of outputs
constexpr int64_t kFloats = 256 << 10;                   // of sums that a range of outputs makes
constexpr int64_t kReady = 512 << 10;                    // bytes of rows that every thread makes ready, once a step
constexpr int64_t kLeast = 16 << 10, kMost = 256 << 10;  // bytes of weights that a range reads

// A router of the model's own may send a row to an expert twice.
int64_t most_tokens(const ExpertsRecord& a, int64_t rows) { return std::min(rows * a.top, kTokens); }

bool in_turn(const ExpertsRecord& a) { return !a.up && !a.plain; }

int64_t row_bytes(const Weight& w) {
  const int64_t codes = w.transposed ? code_bytes(w.kind, w.k) : w.code_row;
  return std::max<int64_t>(codes + w.groups * 4, 1);
}

// The most bytes that each of up to so many rows takes, made ready.
int64_t ready_bytes(const Weight& w, int32_t integers, int64_t tokens) {
  int64_t most = 0;
  for (int64_t m = 1; m <= tokens; ++m)
    most = std::max(most, (program_table().product_ready(w, integers, m) + m - 1) / m);
  return most;
}

// Pairs [first, first + count) of an expert: where their rows begin in a value with `top` parts a row, or one.
struct Pairs {
  const int32_t* pair;
  int64_t count;
};

void make_ready(const ExpertsRecord& a, const Weight& w, const Pairs& p, const float* x, int64_t width, bool parts,
                char* to) {
  for (int64_t t = 0; t < p.count; ++t) {
    const int64_t row = parts ? p.pair[t] : p.pair[t] / a.top;
    program_table().product_prepare(w, a.integers, x + row * width, 0, p.count, t, t + 1, to);
  }
}

void make_in(const Step& s, int64_t range, float* const* v, const int32_t* width, const ExpertsMemory& memory) {
  const ExpertsRecord& a = s.record->experts;
  const ProgramTable& table = program_table();
  Routes& routes = *memory.routes;
  const int64_t which = range / s.ranges[0], begin = range % s.ranges[0] * s.cut[0];
  if (which >= (int64_t)routes.expert.size()) return;
  const int64_t expert = routes.expert[which], end = std::min<int64_t>(begin + s.cut[0], a.inner);
  const int64_t each = in_turn(a) ? 2 : 1, stride = each * s.cut[0];
  const Weight& gate = a.gate[expert];
  float *y = (float*)memory.scratch, *up = y + round_up(most_tokens(a, s.m) * stride, 16);
  for (int64_t first = routes.begin[which]; first < routes.begin[which + 1]; first += kTokens) {
    const Pairs p{routes.pair.data() + first, std::min(kTokens, routes.begin[which + 1] - first)};
    // All experts of one row have the same; else the ranges of one expert come one after the other.
    const int64_t key = s.m == 1 && p.count == 1 ? 0 : first + 1;
    if (routes.ready[0] != key) make_ready(a, gate, p, v[a.x], width[a.x], false, memory.ready);
    routes.ready[0] = key;
    table.product(gate, a.integers, memory.ready, p.count, each * begin, each * end, y, stride, memory.workspace);
    if (a.up) table.product(a.up[expert], a.integers, memory.ready, p.count, begin, end, up, stride, memory.workspace);
    float* to[kTokens];
    for (int64_t t = 0; t < p.count; ++t) to[t] = v[a.hidden] + (int64_t)p.pair[t] * a.inner;
    table.units(a, expert, y, up, stride, p.count, to, begin, end);
  }
}

void make_out(const Step& s, int64_t range, float* const* v, const int32_t* width, const ExpertsMemory& memory) {
  const ExpertsRecord& a = s.record->experts;
  const ProgramTable& table = program_table();
  Routes& routes = *memory.routes;
  const int64_t all = width[a.out], begin = range * s.cut[0], end = std::min<int64_t>(begin + s.cut[0], all);
  const int64_t columns = end - begin, stride = s.cut[0];
  float *sums = (float*)memory.scratch, *y = sums + round_up(s.m * stride, 16);
  for (int64_t row = 0; row < s.m; ++row) {
    if (a.residual >= 0)
      std::memcpy(sums + row * stride, v[a.residual] + row * all + begin, columns * 4);
    else
      std::memset(sums + row * stride, 0, columns * 4);
  }
  for (size_t which = 0; which < routes.expert.size(); ++which) {
    const int64_t expert = routes.expert[which];
    for (int64_t first = routes.begin[which]; first < routes.begin[which + 1]; first += kTokens) {
      const Pairs p{routes.pair.data() + first, std::min(kTokens, routes.begin[which + 1] - first)};
      const char* ready = memory.ready;
      if (s.prepares)
        ready += routes.ready[which];
      else
        make_ready(a, a.down[expert], p, v[a.hidden], a.inner, true, memory.ready);
      table.product(a.down[expert], a.integers, ready, p.count, begin, end, y, stride, memory.workspace);
      float *to[kTokens], weight[kTokens];
      for (int64_t t = 0; t < p.count; ++t) {
        to[t] = sums + p.pair[t] / a.top * stride;
        weight[t] = v[a.weights][p.pair[t]];
      }
      table.expert_sum(a, expert, y, stride, p.count, to, weight, begin, end);
    }
  }
  for (int64_t row = 0; row < s.m; ++row) std::memcpy(v[a.out] + row * all + begin, sums + row * stride, columns * 4);
}

}  // namespace

void Routes::find(const ExpertsRecord& a, const float* chosen, int64_t rows) {
  const int64_t pairs = rows * a.top;
  auto number = [&](int64_t i) { return chosen[i] >= 0 && chosen[i] < (float)a.experts ? (int32_t)chosen[i] : -1; };
  count.assign(a.experts, 0);
  for (int64_t i = 0; i < pairs; ++i)
    if (number(i) >= 0) ++count[number(i)];
  expert.clear();
  begin.assign(1, 0);
  int32_t at = 0;
  for (int32_t e = 0; e < a.experts; ++e) {
    if (!count[e]) continue;
    expert.push_back(e);
    const int32_t many = count[e];
    count[e] = at;
    begin.push_back(at += many);
  }
  pair.resize(at);
  for (int64_t i = 0; i < pairs; ++i)
    if (number(i) >= 0) pair[count[number(i)]++] = (int32_t)i;
  ready.assign(expert.size() + 1, -1);
}

ExpertsBytes cut_experts(const ExpertsRecord& a, int64_t width, int64_t threads, Step* s) {
  const bool in = s->work == Work::expert_in;
  const Weight& w = in ? a.gate[0] : a.down[0];
  const int64_t active = std::min<int64_t>(a.experts, s->m * a.top), each = in && in_turn(a) ? 2 : 1;
  const int64_t n = in ? a.inner : width;
  // What reading a row of outputs takes, and all of them.
  const int64_t row = row_bytes(w) * (in ? (a.plain ? 1 : 2) : active), bytes = row * n * (in ? active : 1);
  const int64_t tokens = most_tokens(a, s->m), ready = ready_bytes(w, a.integers, tokens);
  ExpertsBytes needed{};
  needed.ready = tokens * ready;
  if (!in) {
    const int64_t together = active * 64 + s->m * a.top * ready;
    s->prepares = s->m * a.top <= kTokens && together <= kReady;
    if (s->prepares) needed.ready = together;
  }
  int64_t target = threads == 1 ? kMost : std::clamp(bytes / (4 * threads), kLeast, kMost);
  int64_t rows = std::max(target / row / kRows * kRows, kRows);
  if (!in) {
    // Where each range makes rows ready anew, it is to have as much work with them as that takes.
    if (!s->prepares) rows = std::max(rows, std::clamp(n / (2 * threads), kRows, kColumns) / kRows * kRows);
    rows = std::min(rows, std::max(kFloats / s->m / kRows * kRows, kRows));
  }
  rows = std::min(rows, round_up(n, kRows));
  const int64_t ranges = (n + rows - 1) / rows;
  s->cut[0] = (int32_t)round_up((n + ranges - 1) / ranges, kRows);
  s->ranges[0] = (int32_t)((n + s->cut[0] - 1) / s->cut[0]);
  s->count = (in ? active : 1) * s->ranges[0];
  s->size = std::max<int64_t>((s->count + kMaxChunks * threads - 1) / (kMaxChunks * threads), 1);
  s->chunks = (int32_t)((s->count + s->size - 1) / s->size);

  const int64_t y = round_up(tokens * each * s->cut[0], 16), sums = round_up(s->m * s->cut[0], 16);
  needed.scratch = 4 * (in ? 2 * y : y + sums);
  for (int64_t m = 1; m <= tokens; ++m)
    needed.workspace =
        std::max(needed.workspace, program_table().product_workspace(w, a.integers, m, each * s->cut[0]));
  return needed;
}

void prepare_experts(const Step& s, float* const* v, const int32_t*, const ExpertsMemory& memory) {
  const ExpertsRecord& a = s.record->experts;
  Routes& routes = *memory.routes;
  routes.find(a, v[a.chosen], s.m);
  if (s.work != Work::expert_out || !s.prepares) return;
  int64_t at = 0;
  for (size_t which = 0; which < routes.expert.size(); ++which) {
    const Pairs p{routes.pair.data() + routes.begin[which], routes.begin[which + 1] - routes.begin[which]};
    const Weight& w = a.down[routes.expert[which]];
    routes.ready[which] = at;
    make_ready(a, w, p, v[a.hidden], a.inner, true, memory.ready + at);
    at += round_up(program_table().product_ready(w, a.integers, p.count), 64);
  }
}

void make_experts(const Step& s, int64_t range, float* const* v, const int32_t* width, const ExpertsMemory& memory) {
  s.work == Work::expert_in ? make_in(s, range, v, width, memory) : make_out(s, range, v, width, memory);
}

}  // namespace bigkernels
