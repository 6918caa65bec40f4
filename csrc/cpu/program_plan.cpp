#include "program_plan.h"

#include <algorithm>
#include <map>
#include <memory>

#include "program_check.h"
#include "program_experts.h"

namespace bigkernels {
namespace {

// Up to so many elements, a row record is sooner done by every thread than divided: a barrier is most of a microsecond.
constexpr int64_t kOwn = 16384;
// Up to so many bytes, each value has a place of its own. Beyond, places are used again, because values would not stay
// in the caches.
constexpr int64_t kHelp = int64_t{8} << 20;
constexpr int64_t kLine = 64;

template <class F>
void for_reads(const Step& s, const F& f) {
  const Record& r = *s.record;
  auto one = [&](Value v) {
    if (v >= 0) f(v);
  };
  switch (r.op) {
    case Op::norm: one(r.norm.x), one(r.norm.residual); break;
    case Op::combine:
      for (int i = 0; i < r.combine.count; ++i) one(r.combine.x[i]);
      break;
    case Op::activate: one(r.activate.x), one(r.activate.up); break;
    case Op::product:
      if (s.work == Work::prepare || s.prepares) one(r.product.x);
      if (s.work == Work::product) one(r.product.residual);
      break;
    case Op::heads:
      one(r.heads.q.x);
      if (r.heads.k.count) one(r.heads.k.x), one(r.heads.v.x);
      break;
    case Op::attend: one(r.attend.q); break;
    case Op::experts:
      if (s.work == Work::route) {
        one(r.experts.logits);
        break;
      }
      one(r.experts.chosen);
      if (s.work == Work::expert_in) one(r.experts.x);
      if (s.work == Work::expert_out) one(r.experts.hidden), one(r.experts.weights), one(r.experts.residual);
      break;
    case Op::keep: one(r.keep.x); break;
    case Op::turn: one(r.turn.x.x); break;
    case Op::mix: one(r.mix.q.x), one(r.mix.k.x), one(r.mix.v.x); break;
    case Op::call:
      for (int i = 0; i < r.call.reads; ++i) one(r.call.x[i]);
      break;
  }
}

template <class F>
void for_writes(const Step& s, const F& f) {
  const Record& r = *s.record;
  switch (r.op) {
    case Op::norm: f(r.norm.out); break;
    case Op::combine: f(r.combine.out); break;
    case Op::activate: f(r.activate.out); break;
    case Op::product:
      for (int i = 0; i < (r.product.gated ? 1 : r.product.count); ++i) f(r.product.out[i]);
      break;
    case Op::heads: f(r.heads.out); break;
    case Op::attend: f(r.attend.out); break;
    case Op::experts:
      if (s.work == Work::route)
        f(r.experts.weights), f(r.experts.chosen);
      else
        f(s.work == Work::expert_in ? r.experts.hidden : r.experts.out);
      break;
    case Op::keep: f(r.keep.out); break;
    case Op::turn: f(r.turn.out); break;
    case Op::mix: f(r.mix.out); break;
    case Op::call:
      for (int i = 0; i < r.call.writes; ++i) f(r.call.out[i]);
      break;
  }
}

class Planner {
 public:
  Planner(const ProgramHeader& h, Plan* plan) : h_(h), p_(*plan), threads_(plan->shape.threads) {}

  void make() {
    int64_t bytes = 0;
    for (int i = 0; i < h_.values; ++i) bytes += round_up(p_.rows[i] * h_.width[i] * 4, kLine);
    p_.help = threads_ > 1 && (bytes <= kHelp || p_.shape.batch * p_.shape.tokens == 1);
    p_.rotary.assign(kMaxAngles, 0);
    for (int i = 0; i < h_.records; ++i)
      if (makes_rows(h_.record[i])) add(h_.record[i], i);
    find_places();
    int32_t product = -1;
    for (size_t i = p_.steps.size(); i-- > 0;) {
      p_.steps[i].product = product;
      if (p_.steps[i].work == Work::product) product = (int32_t)i;
    }
    for (Step& s : p_.steps) s.barrier = s.own || s.work == Work::call ? -1 : p_.barriers++;
  }

 private:
  int64_t width(Value v) const { return h_.width[v]; }

  // Where no rows are kept, nothing is made of them.
  bool makes_rows(const Record& r) const {
    if (r.op == Op::call) return p_.rows[r.call.x[0]] > 0;
    Step s{};
    s.record = &r;
    bool any = false;
    for_writes(s, [&](Value v) { any = any || p_.rows[v] > 0; });
    return any;
  }

  Step& step(const Record& r, Work work, int32_t index, int64_t m) {
    p_.steps.push_back({});
    Step& s = p_.steps.back();
    s.record = &r, s.work = work, s.index = index, s.m = m;
    return s;
  }

  // `count` rows or elements of `each` elements, cut in multiples of `unit`.
  void cut(Step& s, int64_t count, int64_t each, int64_t unit) {
    s.count = count;
    s.own = threads_ == 1 || count * each <= kOwn;
    divide(s, unit);
  }
  void divide(Step& s, int64_t unit) {
    const int64_t most = s.own ? 1 : 4 * threads_;
    s.size = std::max(round_up((s.count + most - 1) / most, unit), unit);
    s.chunks = (int32_t)((s.count + s.size - 1) / s.size);
  }

  void add(const Record& r, int32_t index) {
    switch (r.op) {
      case Op::norm: return cut(step(r, Work::rows, index, p_.rows[r.norm.x]), p_.rows[r.norm.x], width(r.norm.x), 1);
      case Op::combine: {
        const int64_t m = p_.rows[r.combine.out];
        return cut(step(r, Work::elements, index, m), m * width(r.combine.out), 1, kLine);
      }
      case Op::activate: {
        const int64_t m = p_.rows[r.activate.out];
        return cut(step(r, Work::elements, index, m), m * r.activate.width, 4, kLine);
      }
      case Op::product: return add_product(r, index);
      case Op::heads: {
        const int64_t m = p_.rows[r.heads.q.x];
        if (r.heads.angles >= 0) p_.rotary[r.heads.angles] = std::max(p_.rotary[r.heads.angles], r.heads.rotary);
        const HeadsRecord& a = r.heads;
        return cut(step(r, Work::rows, index, m), m, (int64_t)(a.q.count + a.k.count) * a.d + a.v.count * a.dv, 1);
      }
      case Op::attend: {
        const int64_t m = p_.rows[r.attend.q];
        const int32_t plan = (int32_t)p_.attends.size();
        p_.attends.push_back(&r.attend);
        step(r, Work::attend, plan, m);
        return cut(step(r, Work::merge, plan, m), m, width(r.attend.out), 1);
      }
      case Op::experts: return add_experts(r, index);
      case Op::keep:
        return cut(step(r, Work::rows, index, p_.rows[r.keep.out]), p_.shape.batch, p_.shape.keep * width(r.keep.x), 1);
      case Op::turn: {
        const TurnRecord& a = r.turn;
        const int64_t m = p_.rows[a.x.x];
        if (a.angles >= 0) p_.rotary[a.angles] = std::max(p_.rotary[a.angles], a.rotary);
        return cut(step(r, Work::rows, index, m), m, (int64_t)a.x.count * a.d, 1);
      }
      case Op::mix:
        p_.mixes.push_back(&r.mix);
        step(r, Work::mix, index, p_.rows[r.mix.q.x]);
        return;
      case Op::call: step(r, Work::call, index, p_.rows[r.call.x[0]]); return;
    }
  }

  // Bytes of a row of a weight, as far as reading it takes time.
  static int64_t row_bytes(const Weight& w) {
    const int64_t codes = w.transposed ? code_bytes(w.kind, w.k) : w.code_row;
    return std::max<int64_t>(codes + w.groups * 4, 1);
  }

  void add_product(const Record& r, int32_t index) {
    const ProductRecord& a = r.product;
    const ProgramTable& table = program_table();
    const int64_t m = p_.rows[a.x];
    const bool own = threads_ == 1 || m * a.weight[0].k <= kOwn;
    Step s{};
    s.record = &r, s.work = Work::product, s.index = index, s.m = m, s.prepares = own;
    int64_t ready = 0, bytes = 0;
    for (int i = 0; i < a.count; ++i) {
      const Weight& w = a.weight[i];
      s.first[i] = true;
      for (int j = 0; j < i && s.first[i]; ++j)
        if (a.weight[j].k == w.k && table.product_form(a.weight[j], a.integers) == table.product_form(w, a.integers))
          s.ready[i] = s.ready[j], s.first[i] = false;
      if (s.first[i]) {
        s.ready[i] = ready;
        ready += round_up(table.product_ready(w, a.integers, m), kLine);
      }
      bytes += w.n * row_bytes(w);
    }
    if (own)
      p_.ready = std::max(p_.ready, ready);
    else
      prepare_apart(r, index, &s, ready);
    cut_weights(a, bytes, &s);
    p_.steps.push_back(s);
  }

  void prepare_apart(const Record& r, int32_t index, Step* product, int64_t bytes) {
    int64_t at = 0;  // in what comes after the values: the next product's, too, which begins when this one is done
    if (p_.help) {
      at = p_.shared;
      p_.shared += bytes;
    }
    apart_ = std::max(apart_, bytes);
    for (int64_t& ready : product->ready) ready += at;
    Step& s = step(r, Work::prepare, index, product->m);
    for (int i = 0; i < kMaxWeights; ++i) s.ready[i] = product->ready[i], s.first[i] = product->first[i];
    s.count = s.m;
    divide(s, 1);
  }

  // Whole blocks of 16 rows, tens to hundreds of kilobytes; some four a thread, and at least one where there are so
  // many blocks. Of many tokens, what a chunk makes has to stay in a core's own cache.
  void cut_weights(const ProductRecord& a, int64_t bytes, Step* s) {
    constexpr int64_t kLeast = 16 << 10, kMost = 256 << 10, kRows = 16, kFloats = 32 << 10;
    int64_t target = threads_ == 1 ? kMost : std::clamp(bytes / (4 * threads_), kLeast, kMost);
    target = std::min(target, std::max<int64_t>(bytes / threads_, 1));
    for (int i = 0; i < (a.gated ? 1 : a.count); ++i) {
      const Weight& w = a.weight[i];
      int64_t rows = std::min(target / (row_bytes(w) * (a.gated ? 2 : 1)), kFloats / s->m);
      rows = std::min(std::max(round_up(rows, kRows), kRows), round_up(w.n, kRows));
      const int64_t ranges = (w.n + rows - 1) / rows;  // of about the same size
      rows = round_up((w.n + ranges - 1) / ranges, kRows);
      s->cut[i] = (int32_t)rows;
      s->ranges[i] = (int32_t)((w.n + rows - 1) / rows);
      s->count += s->ranges[i];
      p_.scratch = std::max(p_.scratch, round_up(s->m * rows * 4, kLine) * (a.gated ? 2 : 1));
      for (int j = i; j < (a.gated ? 2 : i + 1); ++j)
        p_.workspace = std::max(p_.workspace, program_table().product_workspace(a.weight[j], a.integers, s->m, rows));
    }
    s->size = (s->count + kMaxChunks * threads_ - 1) / (kMaxChunks * threads_);
    s->chunks = (int32_t)((s->count + s->size - 1) / s->size);
  }

  void add_experts(const Record& r, int32_t index) {
    const ExpertsRecord& a = r.experts;
    const int64_t m = p_.rows[a.x];
    if (a.logits >= 0) cut(step(r, Work::route, index, m), m, a.experts, 1);
    for (Work work : {Work::expert_in, Work::expert_out}) {
      const ExpertsBytes bytes = cut_experts(a, width(a.out), threads_, &step(r, work, index, m));
      p_.ready = std::max(p_.ready, round_up(bytes.ready, kLine));
      p_.scratch = std::max(p_.scratch, round_up(bytes.scratch, kLine));
      p_.workspace = std::max(p_.workspace, bytes.workspace);
    }
  }

  // ---- where values lie
  // ----------------------------------------------------------------------------------------------

  int64_t take(int64_t bytes) {
    bytes = round_up(bytes, kLine);
    if (!p_.help) {  // the smallest hole that is large enough
      auto best = holes_.end();
      for (auto h = holes_.begin(); h != holes_.end(); ++h)
        if (h->second >= bytes && (best == holes_.end() || h->second < best->second)) best = h;
      if (best != holes_.end()) {
        const int64_t at = best->first, left = best->second - bytes;
        holes_.erase(best);
        if (left) holes_[at + bytes] = left;
        return at;
      }
      // What is free at the end is the beginning of what is taken.
      if (!holes_.empty() && holes_.rbegin()->first + holes_.rbegin()->second == p_.shared) {
        const int64_t at = holes_.rbegin()->first;
        holes_.erase(at);
        p_.shared = at + bytes;
        return at;
      }
    }
    const int64_t at = p_.shared;
    p_.shared += bytes;
    return at;
  }
  void give(int64_t at, int64_t bytes) {
    bytes = round_up(bytes, kLine);
    if (!bytes) return;
    auto [h, added] = holes_.emplace(at, bytes);
    auto next = std::next(h);
    if (next != holes_.end() && at + h->second == next->first) h->second += next->second, holes_.erase(next);
    if (h != holes_.begin()) {
      auto before = std::prev(h);
      if (before->first + before->second == at) before->second += h->second, holes_.erase(h);
    }
  }
  int64_t bytes_of(Value v) const { return p_.rows[v] * width(v) * 4; }

  // The first step that is divided, from each step on: the last that can read what a thread has made for itself.
  std::vector<int> barriers() const {
    std::vector<int> next(p_.steps.size() + 1, (int)p_.steps.size());
    for (int i = (int)p_.steps.size() - 1; i >= 0; --i) next[i] = p_.steps[i].own ? next[i + 1] : i;
    return next;
  }

  void find_places() {
    const int steps = (int)p_.steps.size();
    std::vector<int> first_write(h_.values, -1), last(h_.values, -1);
    for (int i = 0; i < steps; ++i) {
      const Step& s = p_.steps[i];
      if (s.work == Work::merge) {
        first_write[s.record->attend.out] = i - 1;  // its chunks write it, where keys are not cut
        continue;
      }
      if (s.work != Work::prepare)
        for_writes(s, [&](Value v) { first_write[v] = first_write[v] < 0 ? i : first_write[v]; });
      for_reads(s, [&](Value v) { last[v] = i; });
    }
    last[h_.logits] = last[h_.hidden] = steps;
    const bool* mine = find_owned(first_write, last);
    if (threads_ > 1) {
      // A thread may come to an own step while others are in the next divided one, and is not to read what they write.
      const std::vector<int> next = barriers();
      for (int& i : last)
        if (i >= 0 && i < steps) i = next[i];
    }

    p_.place.assign(h_.values, kNowhere);
    p_.place[h_.hidden] = take(bytes_of(h_.hidden));
    int64_t owned = 0;
    for (int i = 0; i < steps; ++i) {
      for (int v = 0; v < h_.values; ++v) {
        if (first_write[v] != i || p_.place[v] != kNowhere) continue;
        if (mine[v]) {
          p_.place[v] = ~owned;
          owned += round_up(bytes_of(v), kLine);
          p_.owned = std::max(p_.owned, owned);
        } else {
          p_.place[v] = take(bytes_of(v));
        }
      }
      if (!p_.steps[i].own) owned = 0;
      if (p_.help) continue;
      for (int v = 0; v < h_.values; ++v)
        if (std::max(last[v], first_write[v]) == i && p_.place[v] >= 0) give(p_.place[v], bytes_of(v));
    }
    if (p_.help) return;
    for (Step& s : p_.steps)
      if (s.work == Work::prepare || (s.work == Work::product && !s.prepares))
        for (int64_t& at : s.ready) at += p_.shared;
    p_.shared += apart_;
  }

  // Values that each thread makes for itself and reads before the next barrier's end. Where places are used again, only
  // these are made so: a thread that comes late would write to what has become another value.
  const bool* find_owned(const std::vector<int>& first_write, const std::vector<int>& last) {
    owned_.reset(new bool[h_.values]());
    if (threads_ == 1) return owned_.get();
    for (Step& s : p_.steps)
      if (s.work == Work::merge && !p_.help) s.own = false, divide(s, 1);
    std::vector<bool> outside(h_.values, false);
    outside[h_.logits] = true;
    for (const Step& s : p_.steps) {
      if (s.work != Work::call) continue;
      for_reads(s, [&](Value v) { outside[v] = true; });
      for_writes(s, [&](Value v) { outside[v] = true; });
    }
    for (bool changed = true; changed;) {
      changed = false;
      const std::vector<int> next = barriers();
      for (int v = 0; v < h_.values; ++v) {
        if (first_write[v] < 0) continue;
        Step& s = p_.steps[first_write[v]];
        owned_[v] = s.own && !outside[v] && last[v] >= 0 && last[v] <= next[first_write[v]];
        if (!owned_[v] && s.own && !p_.help) {
          s.own = false, changed = true;
          divide(s, s.work == Work::elements ? kLine : 1);
        }
      }
    }
    return owned_.get();
  }

  const ProgramHeader& h_;
  Plan& p_;
  const int64_t threads_;
  int64_t apart_ = 0;                 // bytes of the largest product's tokens made ready apart
  std::map<int64_t, int64_t> holes_;  // in the run's memory: where, and bytes
  std::unique_ptr<bool[]> owned_;
};

}  // namespace

std::string make_plan(const ProgramHeader& h, const RunShape& shape, Plan* plan) {
  *plan = {};
  std::string why = check_program(h, shape, &plan->rows);
  if (!why.empty()) return why;
  plan->shape = shape;
  Planner(h, plan).make();
  return why;
}

}  // namespace bigkernels
