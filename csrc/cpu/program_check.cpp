// What can be said against a program before it runs.
#include "program_check.h"

#include <algorithm>

namespace bigkernels {
namespace {

// As in the kernels of heads and attention.
constexpr int kMostElements = 2048, kMostRotary = 1024, kMostSinks = 1024;

bool type_ok(Type t) { return (int)t >= 0 && (int)t <= (int)Type::f16; }
bool vector_ok(const Vector& v) { return !v.data || type_ok(v.type); }
bool act_ok(Activation a) { return (int)a >= 0 && (int)a <= (int)Activation::quick_gelu; }

class Checker {
 public:
  Checker(const ProgramHeader& h, int64_t rows, int64_t kept, std::vector<int64_t>* rows_of)
      : h_(h), rows_(rows), kept_(kept), rows_of_(*rows_of) {
    rows_of_.assign(std::max(h.values, 0), -1);
  }

  std::string run() {
    if (h_.values < 1 || h_.records < 0 || h_.layers < 0 || h_.angles < 0 || h_.angles > kMaxAngles || h_.scores < 0)
      return "its header holds no program";
    for (int i = 0; i < h_.values; ++i)
      if (h_.width[i] < 1) return "value " + std::to_string(i) + " has no columns";
    if (!exists(h_.hidden)) return "it has no hidden states";
    rows_of_[h_.hidden] = rows_;
    for (int i = 0; i < h_.records; ++i)
      if (!check(h_.record[i])) return "record " + std::to_string(i) + ": " + why_;
    if (!has(h_.logits)) return "it makes no logits";
    for (int64_t& rows : rows_of_) rows = std::max<int64_t>(rows, 0);
    return "";
  }

 private:
  bool no(const char* why) {
    why_ = why;
    return false;
  }
  bool exists(Value v) const { return v >= 0 && v < h_.values; }
  bool has(Value v) const { return exists(v) && rows_of_[v] >= 0; }
  int64_t width(Value v) const { return h_.width[v]; }
  bool make(Value v, int64_t rows) {
    if (!exists(v) || rows_of_[v] >= 0) return no("its output is not a value of its own");
    rows_of_[v] = rows;
    return true;
  }
  // A value of the same rows with columns [begin, end).
  bool fits(Value v, int64_t rows, int64_t begin, int64_t end) const {
    return has(v) && rows_of_[v] == rows && begin >= 0 && begin <= end && end <= width(v);
  }
  bool norm_ok(const NormOf& n) const {
    return (int)n.kind >= 0 && (int)n.kind <= (int)NormKind::layer && vector_ok(n.weight) && vector_ok(n.bias);
  }
  bool weight_ok(const Weight& w) const {
    const int kind = (int)w.kind;
    if (w.n < 1 || w.k < 1 || kind < 0 || kind >= kKinds || !w.codes) return false;
    const CodesRow& row = traits(w.kind);
    if (is_plain(w.kind)) return true;
    if (row.block && w.k % row.block) return false;
    if (w.transposed || !w.scale == (row.scale_bytes > 0) || !w.zero == row.zero || !w.row_scale == row.row_scale ||
        !w.book == (row.book > 0))
      return false;
    return row.blocked ? w.group > 0 && w.groups == (w.k + w.group - 1) / w.group : w.group == 0;
  }

  bool check(const Record& r) {
    switch (r.op) {
      case Op::norm: return check(r.norm);
      case Op::combine: return check(r.combine);
      case Op::activate: return check(r.activate);
      case Op::product: return check(r.product);
      case Op::heads: return check(r.heads);
      case Op::attend: return check(r.attend);
      case Op::experts: return check(r.experts);
      case Op::keep: return check(r.keep);
      case Op::call: return check(r.call);
      case Op::turn: return check(r.turn);
      case Op::mix: return check(r.mix);
    }
    return no("no such operation");
  }

  bool check(const NormRecord& a) {
    if (!has(a.x) || a.size < 1 || width(a.x) % a.size || !norm_ok(a.norm)) return no("no such norm");
    if (a.residual >= 0 && (!fits(a.residual, rows_of_[a.x], 0, width(a.x)) || width(a.residual) != width(a.x)))
      return no("the residual does not fit");
    return make(a.out, rows_of_[a.x]) && (width(a.out) == width(a.x) || no("the output does not fit"));
  }
  bool check(const CombineRecord& a) {
    if (a.count < 1 || a.count > kMaxTerms || !exists(a.out)) return no("no such sum");
    for (int i = 0; i < a.count; ++i)
      if (!has(a.x[i]) || width(a.x[i]) != width(a.out) || rows_of_[a.x[i]] != rows_of_[a.x[0]] ||
          !vector_ok(a.channel[i]))
        return no("a term does not fit");
    return make(a.out, rows_of_[a.x[0]]);
  }
  bool check(const ActivateRecord& a) {
    if (!has(a.x) || !act_ok(a.act) || !exists(a.out) || width(a.out) != a.width) return no("no such activation");
    const int64_t rows = rows_of_[a.x];
    if (!fits(a.x, rows, a.x_column, (int64_t)a.x_column + a.width) ||
        (a.up >= 0 && !fits(a.up, rows, a.up_column, (int64_t)a.up_column + a.width)))
      return no("an operand does not fit");
    return make(a.out, rows);
  }
  bool check(const ProductRecord& a) {
    if (!has(a.x) || a.count < 1 || a.count > kMaxWeights || !act_ok(a.act)) return no("no such product");
    const int64_t rows = rows_of_[a.x];
    if (a.gated && (a.count != 2 || a.weight[0].n != a.weight[1].n)) return no("gate and up differ");
    for (int i = 0; i < a.count; ++i) {
      const Weight& w = a.weight[i];
      if (!weight_ok(w) || !vector_ok(a.bias[i])) return no("no such weight");
      if (!fits(a.x, rows, a.x_column, a.x_column + w.k)) return no("its input does not fit a weight");
      if (a.gated && i) break;
      if (!exists(a.out[i]) || a.column[i] < 0 || a.column[i] + w.n > width(a.out[i]))
        return no("its output does not fit a weight");
      if (a.residual >= 0 && !fits(a.residual, rows, a.column[i], a.column[i] + w.n))
        return no("the residual does not fit");
    }
    const int outs = a.gated ? 1 : a.count;
    for (int i = 0; i < outs; ++i) {
      int64_t columns = 0;
      bool seen = false;
      for (int j = 0; j < outs; ++j)
        if (a.out[j] == a.out[i]) columns += a.weight[j].n, seen = seen || j < i;
      if (seen) continue;
      if (!make(a.out[i], rows)) return false;
      if (columns != width(a.out[i])) return no("its weights do not fill an output");
    }
    return true;
  }
  bool heads_ok(const HeadsOf& a, int64_t rows, int64_t d) {
    if (!a.count) return true;
    if (a.count < 0 || !a.column || !has(a.x)) return false;
    for (int h = 0; h < a.count; ++h)
      if (!fits(a.x, rows, a.column[h], a.column[h] + d)) return false;
    return true;
  }
  bool check(const HeadsRecord& a) {
    if (a.q.count < 1 || !has(a.q.x) || a.d < 1 || a.dv < 1 || a.d > kMostElements || a.dv > kMostElements)
      return no("no such heads");
    const int64_t rows = rows_of_[a.q.x];
    if (rows != rows_) return no("heads of some of the rows");
    if (!heads_ok(a.q, rows, a.d) || !heads_ok(a.k, rows, a.d) || !heads_ok(a.v, rows, a.dv) || a.k.count != a.v.count)
      return no("the heads do not fit");
    if (a.layer < 0 || a.layer >= h_.layers) return no("no such cache");
    if (a.angles >= 0 &&
        (a.angles >= h_.angles || a.rotary < 2 || a.rotary % 2 || a.rotary > a.d || a.rotary > kMostRotary))
      return no("no such angles");
    if (!norm_ok(a.q_norm) || !norm_ok(a.k_norm)) return no("no such norm");
    return make(a.out, rows) && (width(a.out) == (int64_t)a.q.count * a.d || no("the output does not fit"));
  }
  bool check(const AttendRecord& a) {
    if (!has(a.q) || a.heads < 1 || a.groups < 1 || a.heads % a.groups || a.d < 1 || a.dv < 1)
      return no("no such attention");
    if (rows_of_[a.q] != rows_ || width(a.q) != (int64_t)a.heads * a.d) return no("the queries do not fit");
    if (a.layer < 0 || a.layer >= h_.layers) return no("no such cache");
    if (a.window < 0 || !vector_ok(a.sinks) || (a.sinks.data && a.heads > kMostSinks))
      return no("no such window or sinks");
    if (a.d > kMostElements || a.dv > kMostElements) return no("heads are too wide");
    if (a.state < -1 || (a.state >= 0 && !make(a.state, rows_))) return no("no such state");
    return make(a.out, rows_) && (width(a.out) == (int64_t)a.heads * a.dv || no("the output does not fit"));
  }
  bool same_form(const Weight& a, const Weight& b) const {
    return a.n == b.n && a.k == b.k && a.kind == b.kind && a.group == b.group && a.transposed == b.transposed;
  }
  // One weight and bias an expert, (n, k) and (n,), all of one form.
  bool experts_ok(const ExpertsRecord& a, const Weight* weight, const Vector* bias, int64_t n, int64_t k) const {
    if (bias && !weight) return false;
    for (int e = 0; weight && e < a.experts; ++e)
      if (!weight_ok(weight[e]) || weight[e].n != n || weight[e].k != k || !same_form(weight[e], weight[0]) ||
          (bias && !vector_ok(bias[e])))
        return false;
    return true;
  }
  bool check(const ExpertsRecord& a) {
    if (!has(a.x) || a.experts < 1 || a.top < 1 || a.top > a.experts || a.inner < 1 || !act_ok(a.act) || !a.gate ||
        !a.down || !exists(a.out) || (a.plain && a.up))
      return no("no such experts");
    const int64_t rows = rows_of_[a.x], d = width(a.x);
    if (rows * a.top > INT32_MAX || (int64_t)a.top * a.inner > INT32_MAX || a.experts > 1 << 24)
      return no("too many experts");
    if (!experts_ok(a, a.gate, a.gate_bias, (a.up || a.plain ? 1 : 2) * (int64_t)a.inner, d) ||
        !experts_ok(a, a.up, a.up_bias, a.inner, d) || (a.up && !same_form(a.gate[0], a.up[0])) ||
        !experts_ok(a, a.down, a.down_bias, width(a.out), a.inner))
      return no("an expert does not fit");
    if (a.logits >= 0 && (!fits(a.logits, rows, 0, a.experts) || width(a.logits) != a.experts))
      return no("the router does not fit");
    for (Value v : {a.weights, a.chosen}) {
      if (a.logits >= 0 && !make(v, rows)) return false;
      if (!fits(v, rows, 0, a.top) || width(v) != a.top) return no("the router does not fit");
    }
    if (a.residual >= 0 && (!fits(a.residual, rows, 0, width(a.out)) || width(a.residual) != width(a.out)))
      return no("the residual does not fit");
    return make(a.hidden, rows) && (width(a.hidden) == (int64_t)a.top * a.inner || no("its units do not fit")) &&
           make(a.out, rows);
  }
  bool check(const KeepRecord& a) {
    if (!has(a.x) || rows_of_[a.x] != rows_ || !exists(a.out) || width(a.out) != width(a.x))
      return no("nothing to keep");
    return make(a.out, kept_);
  }
  bool check(const CallRecord& a) {
    if (a.reads < 1 || a.writes < 0 || !a.x || (a.writes && !a.out)) return no("a call of nothing");
    for (int i = 0; i < a.reads; ++i)
      if (!has(a.x[i])) return no("it reads what is not there");
    for (int i = 0; i < a.writes; ++i)
      if (!make(a.out[i], rows_of_[a.x[0]])) return false;
    return true;
  }

  bool check(const TurnRecord& a) {
    if (a.x.count < 1 || !has(a.x.x) || rows_of_[a.x.x] != rows_ || a.d < 1 || a.d > kMostElements ||
        !heads_ok(a.x, rows_, a.d))
      return no("no such heads");
    if (a.angles >= 0 &&
        (a.angles >= h_.angles || a.rotary < 2 || a.rotary % 2 || a.rotary > a.d || a.rotary > kMostRotary))
      return no("no such angles");
    if (!norm_ok(a.norm)) return no("no such norm");
    return make(a.out, rows_) && (width(a.out) == (int64_t)a.x.count * a.d || no("the output does not fit"));
  }
  bool at_equal_distances(const HeadsOf& a, int64_t count, int64_t d) {
    if (a.count != count || !has(a.x) || rows_of_[a.x] != rows_ || !heads_ok(a, rows_, d)) return false;
    for (int h = 2; h < a.count; ++h)
      if (a.column[h] - a.column[h - 1] != a.column[1] - a.column[0]) return false;
    return true;
  }
  bool check(const MixRecord& a) {
    if (a.heads < 1 || a.groups < 1 || a.heads % a.groups || a.d < 1 || a.dv < 1 || a.d > kMostElements ||
        a.dv > kMostElements || !type_ok(a.type))
      return no("no such attention");
    if (!at_equal_distances(a.q, a.heads, a.d) || !at_equal_distances(a.k, a.groups, a.d) ||
        !at_equal_distances(a.v, a.groups, a.dv))
      return no("the heads do not fit");
    if (a.scores < -1 || a.scores >= h_.scores) return no("no such scores");
    if (!vector_ok(a.sinks) || (a.sinks.data && a.heads > kMostSinks)) return no("no such sinks");
    return make(a.out, rows_) && (width(a.out) == (int64_t)a.heads * a.dv || no("the output does not fit"));
  }

  const ProgramHeader& h_;
  int64_t rows_, kept_;
  std::vector<int64_t>& rows_of_;  // rows of each value; -1: it is not there yet
  const char* why_ = "";
};

}  // namespace

std::string check_program(const ProgramHeader& h, const RunShape& s, std::vector<int64_t>* rows) {
  return Checker(h, s.batch * s.tokens, s.batch * s.keep, rows).run();
}

std::string check_run(const ProgramHeader& h, const Run& run, const std::vector<int32_t>& rotary) {
  for (int64_t i = 0; i < run.rows(); ++i) {
    const int64_t at = run.positions[i];
    for (int t = 0; t < h.angles; ++t)
      if (!run.angles[t].by_row && rotary[t] && (at < 0 || at >= run.angles[t].rows))
        return "a position is " + std::to_string(at) + ", and a rotary table has " +
               std::to_string(run.angles[t].rows) + " rows";
  }
  for (int t = 0; t < h.angles; ++t) {
    const AngleTable& a = run.angles[t];
    if (rotary[t] && (!a.cos || !a.sin || !type_ok(a.type) || a.stride < 0 || (a.by_row && a.rows < run.rows())))
      return "no such rotary table";
  }
  for (int64_t i = 0; run.starts && i < run.batch; ++i)
    if (run.starts[i] < 0) return "a sequence starts before its beginning";
  for (int i = 0; i < h.records; ++i)
    if (h.record[i].op == Op::mix && !run.sequences) return "its rows belong to no sequences";
  if (run.sequences) {
    if (run.batch != 1 || !run.offsets || !run.numbers || (h.scores && !run.scores) || run.offsets[0] != 0 ||
        run.offsets[run.sequences] != run.rows())
      return "its sequences are not its rows";
    for (int64_t i = 0; i < run.sequences; ++i)
      if (run.offsets[i + 1] < run.offsets[i] || run.numbers[i] < 0) return "its sequences are not its rows";
    for (int i = 0; i < h.scores; ++i)
      if (!type_ok(run.scores[i].type)) return "no such scores";
  }
  for (int i = 0; i < h.layers; ++i) {
    const LayerCache& c = run.caches[i];
    if (!c.k || !c.v || !type_ok(c.type) || c.held < 0 || c.held > run.past || c.held + run.tokens > c.capacity ||
        (c.bits != 0 && c.bits != 8) || (c.bits && (!c.k_scale || !c.v_scale)))
      return "the cache of layer " + std::to_string(i) + " has no room for the tokens";
  }
  return "";
}

}  // namespace bigkernels
