// Step programs: the tensors of a call, checked, and its logits. bigkernels/program/_records.py writes the records.
#include <algorithm>

#include "program_neighbours.h"
#include "program_tensors.h"

namespace bigkernels {
namespace {

Place* start_run(const Tensor& program, const Tensor& hidden, const Tensor& positions, const MaybeTensor& starts,
                 const Tensor& caches, const Tensor& angles, int64_t keep, int64_t past) {
  const ProgramHeader* h = header_of(program);
  RunInput in{};
  in.program = h;
  in.threads = torch::stable::get_num_threads();
  calm_neighbours(in.threads);
  BK_CHECK(hidden.dim() == 3 && h->hidden >= 0 && h->hidden < h->values && hidden.size(2) == h->width[h->hidden],
           "hidden states do not fit");
  Run& run = in.run;
  run.batch = hidden.size(0), run.tokens = hidden.size(1), run.past = past, run.keep = keep;
  BK_CHECK(run.batch >= 1 && run.tokens >= 1 && keep >= 0 && keep <= run.tokens && past >= 0 &&
               run.batch * run.tokens < int64_t{1} << 31,
           "a run of ", run.batch, " sequences, ", run.tokens, " tokens after ", past, ", ", keep, " kept");
  in.hidden_type = float_type("hidden", hidden);
  Tensor dense = hidden.is_contiguous() ? hidden : torch::stable::contiguous(hidden);
  in.hidden = dense.const_data_ptr();

  BK_CHECK(positions.is_cpu() && positions.scalar_type() == ScalarType::Long && positions.dim() == 2 &&
               positions.is_contiguous() && positions.size(0) == run.batch && positions.size(1) == run.tokens,
           "positions do not fit");
  run.positions = (const int64_t*)positions.const_data_ptr();
  if (starts) {
    BK_CHECK(starts->is_cpu() && starts->scalar_type() == ScalarType::Long && starts->is_contiguous() &&
                 starts->numel() == run.batch,
             "starts do not fit");
    run.starts = (const int64_t*)starts->const_data_ptr();
  }
  int64_t layers, tables;
  run.caches = list_of<LayerCache>("caches", caches, &layers);
  const auto* table = list_of<AngleTable>("angles", angles, &tables);
  BK_CHECK(layers == h->layers && tables == h->angles && tables <= kMaxAngles, "it has ", h->layers, " caches and ",
           h->angles, " rotary tables");
  std::copy(table, table + tables, run.angles);
  Place* place = nullptr;
  std::string why = program_start(in, &place);
  BK_CHECK(why.empty(), why);
  return place;
}

void run(Tensor program, Tensor hidden, Tensor positions, MaybeTensor starts, Tensor caches, Tensor angles,
         Tensor logits, int64_t past) {
  const ProgramHeader* h = header_of(program);
  BK_CHECK(logits.dim() == 3 && hidden.dim() == 3 && logits.size(0) == hidden.size(0) && h->logits >= 0 &&
               h->logits < h->values && logits.size(2) == h->width[h->logits],
           "logits do not fit");
  check_out(logits, logits.numel());
  for (int i = 0; i < h->records; ++i)
    BK_CHECK(h->record[i].op != Op::call, "its own code has to run in between: program_start");
  Held held{start_run(program, hidden, positions, starts, caches, angles, logits.size(1), past)};
  program_step(held.run);
  if (!logits.numel()) return;
  int64_t rows, width;
  const float* values = program_value(held.run, h->logits, false, &rows, &width);
  BK_CHECK(values && rows * width == logits.numel(), "logits are of all rows");
  copy_out(values, rows * width, logits);
}

int64_t start(Tensor program, Tensor hidden, Tensor positions, MaybeTensor starts, Tensor caches, Tensor angles,
              int64_t keep, int64_t past) {
  return program_number(start_run(program, hidden, positions, starts, caches, angles, keep, past));
}

Place* find(int64_t number) {
  Place* place = program_find(number);
  BK_CHECK(place, "no run ", number);
  return place;
}

int64_t step(int64_t number) { return program_step(find(number)); }

void read(int64_t number, int64_t value, Tensor out) {
  int64_t rows, width;
  const float* from = program_value(find(number), value, false, &rows, &width);
  BK_CHECK(from, "value ", value, " is not to be read here");
  check_out(out, rows * width);
  copy_out(from, rows * width, out);
}

void write(int64_t number, int64_t value, Tensor x) {
  int64_t rows, width;
  float* to = program_value(find(number), value, true, &rows, &width);
  BK_CHECK(to, "value ", value, " is not to be written here");
  const Type type = float_type("x", x);
  Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  BK_CHECK(dense.numel() == rows * width, "value ", value, " has ", rows, " rows of ", width);
  if (type == Type::f32)
    std::memcpy(to, dense.const_data_ptr(), rows * width * 4);
  else
    table().convert(type, false, dense.const_data_ptr(), to, rows * width);
}

int64_t panel_bytes(Tensor program) {
  return program_panels(const_cast<ProgramHeader*>(header_of(program)), nullptr, nullptr);
}

void make_panels(Tensor program, Tensor memory) {
  auto* h = const_cast<ProgramHeader*>(header_of(program));
  BK_CHECK(memory.is_cpu() && memory.is_contiguous() && memory.scalar_type() == ScalarType::Byte &&
               memory.numel() >= program_panels(h, nullptr, nullptr) && (uintptr_t)memory.const_data_ptr() % 64 == 0,
           "no memory for panels");
  std::vector<const Weight*> weights;
  program_panels(h, (uint8_t*)memory.mutable_data_ptr(), &weights);
  // As a step's threads share them, so that memory is first touched where it is read.
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (const Weight* w : weights) {
      const int64_t panels = (w->n + 15) / 16;
      program_table().make_panels(*w, panels * begin / threads, panels * end / threads);
    }
  });
}

// Eight sums beside each other, each of products by odd numbers: any change of one word changes its sum.
uint64_t checksum(const char* p, int64_t bytes) {
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15u;
  uint64_t sums[8] = {1, 2, 3, 4, 5, 6, 7, 8}, words[8];
  auto add = [&] {
    for (int i = 0; i < 8; ++i) sums[i] = (sums[i] ^ words[i]) * kFactor;
  };
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) std::memcpy(words, p + at, 64), add();
  if (at < bytes) {
    std::memset(words, 0, sizeof words);
    std::memcpy(words, p + at, bytes - at);
    add();
  }
  uint64_t all = (uint64_t)bytes;
  for (uint64_t s : sums) all = (all ^ (s ^ s >> 29)) * kFactor;
  return all;
}

Tensor checksums(Tensor ranges) {
  BK_CHECK(ranges.is_cpu() && ranges.is_contiguous() && ranges.scalar_type() == ScalarType::Long && ranges.dim() == 2 &&
               ranges.size(1) == 2,
           "no list of ranges of memory");
  const int64_t count = ranges.size(0), one = 1;
  const auto* range = (const int64_t*)ranges.const_data_ptr();
  Tensor out = empty_strided(&count, &one, 1, ScalarType::Long, count * 8);
  auto* to = (int64_t*)out.mutable_data_ptr();
  parallel_tasks(count, [&](int64_t i) { to[i] = (int64_t)checksum((const char*)range[2 * i], range[2 * i + 1]); });
  return out;
}

void finish(int64_t number) {
  if (Place* place = program_find(number)) program_finish(place);
}

std::vector<int64_t> sizes() {
  return {sizeof(Vector),         sizeof(NormOf),        sizeof(Weight),     sizeof(NormRecord),  sizeof(CombineRecord),
          sizeof(ActivateRecord), sizeof(ProductRecord), sizeof(HeadsOf),    sizeof(HeadsRecord), sizeof(AttendRecord),
          sizeof(ExpertsRecord),  sizeof(KeepRecord),    sizeof(CallRecord), sizeof(Record),      sizeof(ProgramHeader),
          sizeof(AngleTable),     sizeof(LayerCache),    sizeof(TurnRecord), sizeof(MixRecord),   sizeof(ScoresTable)};
}

std::tuple<int64_t, int64_t> delays(int64_t every) {
  BK_CHECK(every >= 0, "pauses once in ", every, " places");
  auto [taken_over, made_again] = program_delays(every);
  return {taken_over, made_again};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("program_run", TORCH_BOX(&run));
  m.impl("program_start", TORCH_BOX(&start));
  m.impl("program_write", TORCH_BOX(&write));
  m.impl("program_read", TORCH_BOX(&read));
  m.impl("program_panel_bytes", TORCH_BOX(&panel_bytes));
  m.impl("program_make_panels", TORCH_BOX(&make_panels));
  m.impl("program_checksums", TORCH_BOX(&checksums));
}

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CompositeExplicitAutograd, m) {
  m.impl("program_step", TORCH_BOX(&step));
  m.impl("program_finish", TORCH_BOX(&finish));
  m.impl("program_settle", TORCH_BOX(&program_settle));
  m.impl("program_sizes", TORCH_BOX(&sizes));
  m.impl("program_delays", TORCH_BOX(&delays));
}

}  // namespace bigkernels
