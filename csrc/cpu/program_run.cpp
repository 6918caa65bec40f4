#include "program_run.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "program_check.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace bigkernels {

Block::~Block() { release(); }

void Block::release() {
  std::free(data_);
  data_ = nullptr, bytes_ = 0;
}

char* Block::reserve(int64_t bytes) {
  if (bytes <= bytes_ && data_) return data_;
  release();
  bytes_ = round_up(std::max<int64_t>(bytes, 1), 4096);
  data_ = (char*)std::aligned_alloc(4096, bytes_);
  if (!data_) {
    bytes_ = 0;
    throw std::bad_alloc();
  }
#if defined(__linux__)
  if (bytes_ >= int64_t{4} << 20) madvise(data_, bytes_, MADV_HUGEPAGE);  // page faults would cost more than it is for
#endif
  return data_;
}

std::string ProgramRun::start(const RunInput& in) {
  const Run& run = in.run;
  const RunShape shape{in.program->id, run.batch, run.tokens, run.keep, in.threads};
  header_ = in.program;
  if (!matches(shape)) {
    std::string why = make_plan(*in.program, shape, &plan_);
    if (!why.empty()) {
      plan_.shape = {};
      return why;
    }
    width_.assign(header_->width, header_->width + header_->values);
    shares_.reset(new Share[plan_.barriers * in.threads]());
    typical_.reset(new std::atomic<int32_t>[plan_.barriers]());
    epoch_ = 0;
  }
  std::string why = check_run(*header_, run, plan_.rotary);
  if (!why.empty()) return why;
  copy_input(in);

  attends_.clear();
  states_.clear();
  int64_t end = plan_.shared, most = 0;
  workspace_ = plan_.workspace;
  for (const AttendRecord* a : plan_.attends) {
    const AttendPlan cut = program_table().attend_plan(*a, run_, in.threads);
    const int64_t bytes = round_up(cut.state * 4, 64);
    states_.push_back(end);
    if (plan_.help) end += bytes;
    most = std::max(most, bytes);
    workspace_ = std::max(workspace_, cut.workspace);
    attends_.push_back(cut);
  }
  for (const MixRecord* m : plan_.mixes) workspace_ = std::max(workspace_, program_table().mix_workspace(*m, run_));
  if (!plan_.help) end += most;
  // Twice the sums, which grow with every token.
  if (end > block_.bytes()) block_.reserve(end + (end - plan_.shared));
  values_.resize(header_->values);
  for (int v = 0; v < header_->values; ++v)
    values_[v] = plan_.place[v] >= 0 ? (float*)(block_.data() + plan_.place[v]) : nullptr;

  float* hidden = values_[header_->hidden];
  const int64_t n = run.rows() * width_[header_->hidden];
  if (in.hidden_type == Type::f32)
    std::memcpy(hidden, in.hidden, n * 4);
  else
    table().convert(in.hidden_type, false, in.hidden, hidden, n);
  // After a wrap, words of the run 2^32 runs ago would count.
  if (++epoch_ == 0) {
    std::fill_n((char*)shares_.get(), plan_.barriers * in.threads * sizeof(Share), 0);
    epoch_ = 1;
  }
#if defined(__SSE2__)
  control_ = _mm_getcsr();
#endif
  at.store(0, std::memory_order_relaxed);  // published with the run
  return "";
}

// A thread that lost its core may read these long after the call has returned.
void ProgramRun::copy_input(const RunInput& in) {
  run_ = in.run;
  positions_.assign(in.run.positions, in.run.positions + in.run.rows());
  run_.positions = positions_.data();
  if (in.run.starts) {
    starts_.assign(in.run.starts, in.run.starts + in.run.batch);
    run_.starts = starts_.data();
  }
  caches_.assign(in.run.caches, in.run.caches + header_->layers);
  run_.caches = caches_.data();
  if (in.run.sequences) {
    offsets_.assign(in.run.offsets, in.run.offsets + in.run.sequences + 1);
    numbers_.assign(in.run.numbers, in.run.numbers + in.run.sequences);
    scores_.assign(in.run.scores, in.run.scores + header_->scores);
    run_.offsets = offsets_.data(), run_.numbers = numbers_.data(), run_.scores = scores_.data();
  }
  for (int t = 0; t < header_->angles; ++t) {
    AngleTable& a = run_.angles[t];
    const int64_t columns = plan_.rotary[t], size = size_of(a.type);
    if (!a.by_row || !columns) continue;
    for (int part = 0; part < 2; ++part) {
      const void*& data = part ? a.sin : a.cos;
      std::vector<char>& to = angles_[2 * t + part];
      to.resize(in.run.rows() * columns * size);
      for (int64_t r = 0; r < in.run.rows(); ++r)
        std::memcpy(to.data() + r * columns * size, (const char*)data + r * a.stride * size, columns * size);
      data = to.data();
    }
    a.stride = columns;
  }
}

float* ProgramRun::value(int64_t value, bool write, int64_t* rows, int64_t* width) {
  if (value < 0 || value >= header_->values || plan_.place[value] < 0) return nullptr;
  bool accessible = false;
  const int64_t now = at.load(std::memory_order_acquire);
  if (now < (int64_t)plan_.steps.size()) {
    const Step& s = plan_.steps[now];
    if (s.work != Work::call) return nullptr;
    const CallRecord& c = s.record->call;
    const Value* list = write ? c.out : c.x;
    for (int i = 0; i < (write ? c.writes : c.reads); ++i) accessible = accessible || list[i] == value;
  } else {
    accessible = !write && value == header_->logits;
  }
  if (!accessible) return nullptr;
  *rows = plan_.rows[value], *width = width_[value];
  return values_[value];
}

void ProgramRun::enter(Worker& w) const {
  const int64_t ready = plan_.owned, scratch = ready + plan_.ready, workspace = scratch + plan_.scratch;
  char* memory = w.block.reserve(round_up(workspace, 4096) + workspace_);
  w.ready = memory + ready, w.scratch = memory + scratch, w.workspace = memory + round_up(workspace, 4096);
  w.values.assign(1, nullptr);
  w.values.insert(w.values.end(), values_.begin(), values_.end());
  for (size_t v = 0; v < values_.size(); ++v)
    if (plan_.place[v] < 0 && plan_.place[v] != kNowhere) w.values[v + 1] = (float*)(memory + ~plan_.place[v]);
}

namespace {

// Tokens [begin, end) made ready for the weights of a product, once for each form of theirs.
void make_ready(const Step& s, float* const* v, const int32_t* width, int64_t begin, int64_t end, char* ready) {
  const ProductRecord& a = s.record->product;
  for (int i = 0; i < a.count; ++i)
    if (s.first[i])
      program_table().product_prepare(a.weight[i], a.integers, v[a.x] + a.x_column, width[a.x], s.m, begin, end,
                                      ready + s.ready[i]);
}

}  // namespace

void ProgramRun::prepare(const Step& s, Worker& w) const {
  if (s.work == Work::product && s.prepares) make_ready(s, w.values.data() + 1, width_.data(), 0, s.m, w.ready);
  if (s.work == Work::expert_in || s.work == Work::expert_out)
    prepare_experts(s, w.values.data() + 1, width_.data(), w.experts());
}

void ProgramRun::make_product(const Step& s, int64_t range, Worker& w) const {
  const ProductRecord& a = s.record->product;
  const ProgramTable& table = program_table();
  int i = 0;
  while (range >= s.ranges[i]) range -= s.ranges[i++];
  const int64_t begin = range * s.cut[i], end = std::min(begin + s.cut[i], a.weight[i].n), stride = s.cut[i];
  const char* ready = s.prepares ? w.ready : block_.data();
  float *y = (float*)w.scratch, *up = (float*)(w.scratch + round_up(s.m * stride * 4, 64));
  // Panels of gate and up lie in turn.
  const int64_t step = a.gated && a.weight[0].panels ? 16 : end - begin;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t last = std::min(n + step, end);
    table.product(a.weight[i], a.integers, ready + s.ready[i], s.m, n, last, y + n - begin, stride, w.workspace);
    if (a.gated)
      table.product(a.weight[1], a.integers, ready + s.ready[1], s.m, n, last, up + n - begin, stride, w.workspace);
  }
  table.finish(a, i, y, a.gated ? up : nullptr, stride, s.m, w.values.data() + 1, width_.data(), begin, end);
}

constexpr int64_t kAskedPanels = 4096;  // bytes

void ProgramRun::ask_ahead(const Step& s, int64_t thread) const {
  if (s.product < 0) return;
  const Step& next = plan_.steps[s.product];
  const ProductRecord& a = next.record->product;
  int64_t range = next.chunks * thread / plan_.shape.threads * next.size;
  int i = 0;
  while (i < kMaxWeights - 1 && range >= next.ranges[i] && next.ranges[i + 1]) range -= next.ranges[i++];
  const Weight& w = a.weight[i];
  if (w.transposed) return;
  const int64_t row = std::min(range * next.cut[i], w.n - 1);
  const bool panels = w.panels;
  const uint8_t* p = panels ? w.panels + row / 16 * w.panel_step : w.codes + row * w.code_row;
  const int64_t bytes = panels ? kAskedPanels : std::min<int64_t>(2048, w.code_row);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

void ProgramRun::make(const Step& s, int64_t chunk, Worker& w) const {
  const ProgramTable& table = program_table();
  const Record& r = *s.record;
  float** v = w.values.data() + 1;
  const int32_t* width = width_.data();
  const int64_t size = chunk_size(s), begin = chunk * size;
  const int64_t end = std::min(begin + size, s.work == Work::attend || s.work == Work::mix ? units(s) : s.count);
  switch (s.work) {
    case Work::rows:
      if (r.op == Op::norm) {
        table.norm(r.norm, v, width, begin, end);
      } else if (r.op == Op::heads) {
        const Progress progress{(const int64_t*)&at, &s - plan_.steps.data()};
        table.heads(r.heads, run_, v, width, begin, end, plan_.shape.threads > 1 ? &progress : nullptr);
      } else if (r.op == Op::turn) {
        table.turn(r.turn, run_, v, width, begin, end);
      } else {  // keep, by sequences
        const int64_t bytes = run_.keep * width[r.keep.x] * 4, all = run_.tokens * width[r.keep.x];
        for (int64_t b = begin; b < end; ++b)
          std::memcpy((char*)v[r.keep.out] + b * bytes, v[r.keep.x] + (b + 1) * all - bytes / 4, bytes);
      }
      break;
    case Work::elements:
      r.op == Op::combine ? table.combine(r.combine, v, width, begin, end)
                          : table.activate(r.activate, v, width, begin, end);
      break;
    case Work::prepare: make_ready(s, v, width, begin, end, block_.data()); break;
    case Work::product:
      for (int64_t range = begin; range < end; ++range) make_product(s, range, w);
      break;
    case Work::attend:
      v[r.attend.state] = (float*)(block_.data() + states_[s.index]);
      for (int64_t range = begin; range < end; ++range)
        table.attend(r.attend, run_, attends_[s.index], range, v, width, w.workspace);
      break;
    case Work::merge:
      v[r.attend.state] = (float*)(block_.data() + states_[s.index]);
      if (attends_[s.index].state > 0) table.attend_merge(r.attend, run_, attends_[s.index], v, width, begin, end);
      break;
    case Work::mix: table.mix(r.mix, run_, v, width, begin, end, w.workspace); break;
    case Work::route: table.route(r.experts, v, begin, end); break;
    case Work::expert_in:
    case Work::expert_out:
      for (int64_t range = begin; range < end; ++range) make_experts(s, range, v, width, w.experts());
      break;
    default: break;
  }
}

}  // namespace bigkernels
