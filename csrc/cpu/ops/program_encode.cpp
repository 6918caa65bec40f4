// Programs of encoders: sequences of a padded batch without their padding, some at a time, and back.
#include <algorithm>

#include "program_neighbours.h"
#include "program_tensors.h"

namespace bigkernels {
namespace {

struct Sequence {
  int64_t number, first, rows;  // of the batch; its first token there, and how many it has
};

// Rows of some sequences, one after the other.
class Rows {
 public:
  Rows(const Tensor& hidden, const Sequence* begin, const Sequence* end)
      : length_(hidden.size(1)), row_(hidden.size(2) * hidden.element_size()) {
    offsets.push_back(0);
    const char* from = (const char*)hidden.const_data_ptr();
    auto at = [&](const Sequence& s) { return from + (s.number * length_ + s.first) * row_; };
    bool joined = true;
    for (const Sequence* s = begin; s < end; ++s) {
      joined = joined && at(*s) == at(*begin) + offsets.back() * row_;
      offsets.push_back(offsets.back() + s->rows);
      numbers.push_back(s->number);
      for (int64_t t = 0; t < s->rows; ++t) positions.push_back(t);
    }
    data = at(*begin);
    if (joined) return;
    copied_.resize(offsets.back() * row_);
    char* to = copied_.data();
    for (const Sequence* s = begin; s < end; to += s->rows * row_, ++s) std::memcpy(to, at(*s), s->rows * row_);
    data = copied_.data();
  }

  const char* data;
  std::vector<int64_t> offsets, numbers, positions;

 private:
  int64_t length_, row_;
  std::vector<char> copied_;
};

void check_scores(const ScoresTable* table, int64_t count, int64_t batch, int64_t length) {
  for (int64_t i = 0; i < count; ++i) {
    const ScoresTable& s = table[i];
    for (int64_t step :
         {s.mask_batch, s.mask_head, s.mask_query, s.mask_key, s.bias_batch, s.bias_head, s.bias_query, s.bias_key})
      BK_CHECK(step >= 0, "scores lie backwards");
    BK_CHECK(s.left >= -1 && s.right >= -1 && batch > 0 && length > 0, "no such window");
  }
}

// Each of `sequences`, (n, 3) with its number in the batch, its first token and its length, is a text of its own: its
// positions begin with 0. `out` gets their rows; what belongs to none is left as it is. Up to `most` rows go at once.
void encode(Tensor program, Tensor hidden, Tensor sequences, Tensor scores, Tensor angles, Tensor out, int64_t most) {
  const ProgramHeader* h = header_of(program);
  BK_CHECK(hidden.dim() == 3 && hidden.is_contiguous() && h->hidden >= 0 && h->hidden < h->values &&
               hidden.size(2) == h->width[h->hidden],
           "hidden states do not fit");
  BK_CHECK(out.dim() == 3 && h->logits >= 0 && h->logits < h->values && out.size(0) == hidden.size(0) &&
               out.size(1) == hidden.size(1) && out.size(2) == h->width[h->logits],
           "the output does not fit");
  check_out(out, out.numel());
  for (int i = 0; i < h->records; ++i)
    BK_CHECK(h->record[i].op != Op::call && h->record[i].op != Op::keep, "it is no encoder's");
  int64_t count, tables, layers;
  const auto* sequence = list_of<Sequence>("sequences", sequences, &count);
  const auto* angle = list_of<AngleTable>("angles", angles, &tables);
  const auto* score = list_of<ScoresTable>("scores", scores, &layers);
  BK_CHECK(layers == h->scores && tables == h->angles && tables <= kMaxAngles && h->layers == 0, "it has ", h->scores,
           " scores and ", h->angles, " rotary tables");
  BK_CHECK(most >= 1, "no rows at once");
  check_scores(score, layers, hidden.size(0), hidden.size(1));
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& s = sequence[i];
    BK_CHECK(
        s.number >= 0 && s.number < hidden.size(0) && s.first >= 0 && s.rows >= 1 && s.first + s.rows <= hidden.size(1),
        "sequence ", i, " is not in the batch");
  }
  RunInput in{};
  in.program = h;
  in.threads = torch::stable::get_num_threads();
  calm_neighbours(in.threads);
  in.hidden_type = float_type("hidden", hidden);
  std::copy(angle, angle + tables, in.run.angles);
  in.run.batch = 1, in.run.scores = score;
  const Type type = type_of(out);
  const int64_t width = out.size(2), row = width * size_of(type);
  bool lent = false;  // a caller's masks are read by their address
  for (int64_t i = 0; i < layers; ++i) lent = lent || score[i].mask || score[i].bias;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t rows = sequence[begin].rows;
    for (end = begin + 1; end < count && rows + sequence[end].rows <= most; ++end) rows += sequence[end].rows;
    const Rows given(hidden, sequence + begin, sequence + end);
    in.hidden = given.data;
    in.run.tokens = in.run.keep = rows;
    in.run.positions = given.positions.data();
    in.run.sequences = end - begin, in.run.offsets = given.offsets.data(), in.run.numbers = given.numbers.data();
    Place* place = nullptr;
    std::string why = program_start(in, &place);
    BK_CHECK(why.empty(), why);
    {
      Held held{place};
      program_step(place);
      int64_t value_rows, value_width;
      const float* values = program_value(place, h->logits, false, &value_rows, &value_width);
      BK_CHECK(values && value_rows == rows && value_width == width, "it made other rows");
      for (const Sequence* s = sequence + begin; s < sequence + end; values += s->rows * width, ++s) {
        char* to = (char*)out.mutable_data_ptr() + (s->number * out.size(1) + s->first) * row;
        if (type == Type::f32)
          std::memcpy(to, values, s->rows * row);
        else
          table().convert(type, true, values, to, s->rows * width);
      }
    }
    if (lent) program_settle();  // threads that lost their core may still read them
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) { m.impl("program_encode", TORCH_BOX(&encode)); }

}  // namespace bigkernels
