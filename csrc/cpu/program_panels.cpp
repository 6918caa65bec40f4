// Where the panels of a program's codes lie: in the order of its records, so that a step reads them as one stream.
#include <bigkernels/runner.h>

#include <map>
#include <tuple>

namespace bigkernels {
namespace {

class Placer {
 public:
  Placer(uint8_t* memory, std::vector<const Weight*>* weights) : memory_(memory), weights_(weights) {}

  int64_t bytes() const { return bytes_; }

  void one(Weight* w, int32_t integers) {
    const int64_t bytes = program_table().panel_bytes(*w, integers);
    if (!bytes || known(w)) return;
    take(w, bytes_, bytes);
    bytes_ += bytes * panels(*w);
  }
  // Of gate and up, which are read side by side: in turn.
  void two(Weight* a, Weight* b, int32_t integers) {
    const int64_t first = program_table().panel_bytes(*a, integers);
    const int64_t second = program_table().panel_bytes(*b, integers);
    if (!first || !second || same(*a, *b) || known(a) || known(b)) return one(a, integers), one(b, integers);
    take(a, bytes_, first + second);
    take(b, bytes_ + first, first + second);
    bytes_ += (first + second) * panels(*a);
  }

 private:
  typedef std::tuple<const void*, const void*, int64_t, int64_t, int64_t, int> Key;
  static Key key(const Weight& w) { return {w.codes, w.scale, w.n, w.k, w.group, (int)w.kind}; }
  static bool same(const Weight& a, const Weight& b) { return key(a) == key(b); }
  static int64_t panels(const Weight& w) { return (w.n + 15) / 16; }

  // A weight that the program has twice.
  bool known(Weight* w) {
    auto entry = places_.find(key(*w));
    if (entry == places_.end()) return false;
    if (memory_) w->panels = memory_ + entry->second.first, w->panel_step = entry->second.second;
    return true;
  }
  void take(Weight* w, int64_t at, int64_t step) {
    places_[key(*w)] = {at, step};
    if (!memory_) return;
    w->panels = memory_ + at, w->panel_step = step;
    weights_->push_back(w);
  }

  uint8_t* memory_;
  std::vector<const Weight*>* weights_;
  int64_t bytes_ = 0;
  std::map<Key, std::pair<int64_t, int64_t>> places_;  // where panels begin, and their step
};

}  // namespace

int64_t program_panels(ProgramHeader* h, uint8_t* memory, std::vector<const Weight*>* weights) {
  Placer placer(memory, weights);
  for (int i = 0; i < h->records; ++i) {
    auto& r = const_cast<Record&>(h->record[i]);
    if (r.op == Op::product) {
      ProductRecord& a = r.product;
      if (a.gated && a.count == 2 && a.weight[0].n == a.weight[1].n) {
        placer.two(&a.weight[0], &a.weight[1], a.integers);
        continue;
      }
      for (int w = 0; w < a.count && w < kMaxWeights; ++w) placer.one(&a.weight[w], a.integers);
    } else if (r.op == Op::experts) {
      const ExpertsRecord& a = r.experts;
      for (const Weight* list : {a.gate, a.up, a.down})
        for (int e = 0; list && e < a.experts; ++e) placer.one(const_cast<Weight*>(list + e), a.integers);
    }
  }
  return placer.bytes();
}

}  // namespace bigkernels
