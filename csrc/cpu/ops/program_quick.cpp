// One more token of a cache that a program knows, as a function of Python's own: bigkernels/program/_quick.py.
//
// After a step has read a model's weights nothing else is in the caches, and each object, function or operator that a
// call touches is waited for: what takes 60 us of Python where it is repeated takes 350 there. So all that may stand
// against a call is looked at here, in one function with the interpreter's C functions, which the caller hands over (so
// that this needs no Python to build). It answers with logits, or with None, having changed nothing: then whoever has
// more time looks at the call.
#include <bigkernels/runner.h>
#include <bigkernels/stable.h>

#include <algorithm>
#include <cstring>

#include "../cache_lease.h"
#include "../embedding_rows.h"
#include "program_neighbours.h"

extern "C" int64_t bk_same_words(const int64_t* const* addresses, const int64_t* words, int64_t begin, int64_t count);
extern "C" int bk_same_bytes(const int64_t* ranges, int64_t count);

namespace bigkernels {
namespace {

typedef void Object;  // PyObject

// Functions of the interpreter's stable ABI, and one of DLPack's.
struct Interpreter {
  int (*dict_next)(Object*, int64_t*, Object**, Object**);
  Object* (*call)(Object*, Object*, Object*);
  Object* (*tuple_item)(Object*, int64_t);
  Object* (*tuple)(int64_t, ...);
  Object* (*long_of)(long long);
  long long (*as_long)(Object*);
  void (*drop)(Object*);
  void (*keep)(Object*);
  void (*clear_error)();
  void* (*release)();
  void (*restore)(void*);
  int (*describe)(Object*, void*);
};
Interpreter python;

struct DLTensor {  // DLPack 1
  void* data;
  int32_t device_type, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
  char* at() const { return (char*)data + byte_offset; }
};

enum Name { kIds, kMask, kPositions, kCache, kPast, kUseCache, kReturnDict, kKeep, kNames };
constexpr int kAsked = 6;
constexpr int64_t kRows = 64;

// bigkernels/program/_quick.py writes these, word by word.
struct Quick {
  Object* names[kNames];
  Object *none, *yes, *no, *tensor, *integer, *cache, *empty_tuple;
  Object* embed;            // (input_ids, position_ids, None) gives hidden states; null: they are rows of `embeddings`
  Object *empty, *options;  // logits are empty(batch, keep, vocabulary, **options)
  Object* batch_of;
  Object* vocabulary_of;
  Object *ask[kAsked], *answer[kAsked];  // functions without arguments, and what they have to say
  const char* const* lines;              // of the words that are compared
  int64_t line_count;
  const int64_t* const* addresses;
  const int64_t* words;
  int64_t word_count;
  const int64_t *ranges, *sources;  // bytes that are compared with copies
  int64_t range_count, source_count;
  CacheLease* lease;
  const ProgramHeader* program;
  const AngleTable* angles;
  int64_t angle_rows;      // positions that have angles
  const Weight* codes;     // of embeddings; null: they are numbers, as hidden states are
  const char* embeddings;  // (vocabulary, row) bytes
  int64_t embedding_rows, embedding_row;
  int64_t hidden_type, logits_type;
  int64_t batch, vocabulary, tuple_by_default;
  int64_t counted[2];  // whether positions that are not given are places in the cache, with padding too
  char* hidden;        // room for kRows rows
};

Object* type_of_object(const Object* x) { return *((Object* const*)x + 1); }

// A call as it was understood.
struct Call {
  Object* given[kNames] = {};
  DLTensor ids;
  int64_t tokens = 0, keep = 0;
  int64_t positions[kRows], starts[kRows];
  bool padded = false;
};

bool understand(const Quick& q, Object* kwargs, Call* c) {
  int64_t at = 0;
  for (Object *key, *value; python.dict_next(kwargs, &at, &key, &value);) {
    int n = 0;
    while (n < kNames && key != q.names[n]) ++n;
    if (n < kNames)
      c->given[n] = value;
    else if (value != q.none && value != q.no)
      return false;
  }
  Object* cache = c->given[c->given[kCache] ? kCache : kPast];
  if (cache != q.cache || !q.lease->valid || !c->given[kIds]) return false;
  const Object* as = c->given[kReturnDict];
  if (as != q.yes && ((as && as != q.none) || q.tuple_by_default)) return false;
  return true;
}

bool plain(const Quick& q, Object* x, DLTensor* t) {
  return x && type_of_object(x) == q.tensor && !python.describe(x, t) && t->device_type == 1 && t->dimensions == 2 &&
         t->lanes == 1;
}
bool whole_numbers(const DLTensor& t) { return t.code == 0 && t.bits == 64; }
int64_t number_at(const DLTensor& t, int64_t row, int64_t column) {
  return ((const int64_t*)t.at())[row * t.strides[0] + column * t.strides[1]];
}

bool read_tokens(const Quick& q, Call* c) {
  if (!plain(q, c->given[kIds], &c->ids) || !whole_numbers(c->ids) || c->ids.shape[0] != q.batch) return false;
  c->tokens = c->ids.shape[1];
  if (c->tokens < 1 || c->tokens * q.batch > kRows || c->tokens > q.lease->room) return false;
  int64_t keep = 0;
  if (Object* given = c->given[kKeep]) {
    if (type_of_object(given) != q.integer) return false;
    keep = python.as_long(given);
    if (keep < 0) return false;
  }
  c->keep = keep ? std::min(keep, c->tokens) : c->tokens;
  return true;
}

// What a mask (B, past + tokens) hides may only be the first tokens of sequences.
bool read_mask(const Quick& q, Call* c) {
  Object* given = c->given[kMask];
  if (!given || given == q.none) return true;
  DLTensor t;
  const int64_t length = q.lease->past + c->tokens;
  if (!plain(q, given, &t) || t.shape[0] != q.batch || t.shape[1] != length) return false;
  const bool bytes = t.code == 6 && t.bits == 8;
  if ((!bytes && !whole_numbers(t)) || t.strides[1] != 1) return false;
  for (int64_t b = 0; b < q.batch; ++b) {
    int64_t first = 0;
    auto count = [&](const auto* row) {
      while (first < length && !row[first]) ++first;
      int64_t i = first;
      while (i < length && row[i]) ++i;
      return i == length;
    };
    const char* row = t.at() + b * t.strides[0] * (bytes ? 1 : 8);
    if (!(bytes ? count((const uint8_t*)row) : count((const int64_t*)row)) || first == length) return false;
    c->starts[b] = first;
    c->padded = c->padded || first;
  }
  return true;
}

bool read_positions(const Quick& q, Call* c) {
  Object* given = c->given[kPositions];
  const bool masked = c->given[kMask] && c->given[kMask] != q.none;
  if (!given || given == q.none) {
    if (!q.counted[c->padded]) return false;
    for (int64_t r = 0; r < q.batch * c->tokens; ++r) c->positions[r] = q.lease->past + r % c->tokens;
  } else {
    DLTensor t;
    if (!plain(q, given, &t) || !whole_numbers(t) || t.shape[1] != c->tokens) return false;
    if (t.shape[0] != 1 && t.shape[0] != q.batch) return false;
    for (int64_t b = 0; b < q.batch; ++b)
      for (int64_t s = 0; s < c->tokens; ++s) {
        const int64_t at = number_at(t, t.shape[0] == 1 ? 0 : b, s);
        // Else, without a mask, these are several sequences in one.
        if (s && !masked && at != c->positions[b * c->tokens + s - 1] + 1) return false;
        c->positions[b * c->tokens + s] = at;
      }
  }
  for (int64_t r = 0; r < q.batch * c->tokens; ++r)
    if (c->positions[r] < 0 || c->positions[r] >= q.angle_rows) return false;
  return true;
}

bool embed(const Quick& q, const Call& c) {
  char* to = q.hidden;
  std::vector<float> row, scales;
  for (int64_t b = 0; b < q.batch; ++b)
    for (int64_t s = 0; s < c.tokens; ++s, to += q.embedding_row) {
      const int64_t id = number_at(c.ids, b, s);
      if (id < 0 || id >= q.embedding_rows) return false;
      if (!q.codes) {
        std::memcpy(to, q.embeddings + id * q.embedding_row, q.embedding_row);
        continue;
      }
      row.resize(q.codes->k);
      embedding_row(*q.codes, id, row.data(), scales);
      if ((Type)q.hidden_type == Type::f32)
        std::memcpy(to, row.data(), q.embedding_row);
      else
        table().convert((Type)q.hidden_type, true, row.data(), to, q.codes->k);
    }
  return true;
}

// Hidden states by the model's own code, (batch, tokens, width); null with or without an error.
Object* embedded(const Quick& q, const Call& c, const void** data) {
  Object* positions = c.given[kPositions] ? c.given[kPositions] : q.none;
  Object* given = python.tuple(3, c.given[kIds], positions, q.none);
  if (!given) return nullptr;
  Object* tensor = python.call(q.embed, given, nullptr);
  python.drop(given);
  if (!tensor) return nullptr;
  DLTensor t;
  const Type type = (Type)q.hidden_type;
  const int64_t width = q.program->width[q.program->hidden];
  const bool fits = type_of_object(tensor) == q.tensor && !python.describe(tensor, &t) && t.device_type == 1 &&
                    t.dimensions == 3 && t.shape[0] == q.batch && t.shape[1] == c.tokens && t.shape[2] == width &&
                    t.code == (type == Type::bf16 ? 4 : 2) && t.bits == 8 * size_of(type) && t.lanes == 1 &&
                    t.strides[2] == 1 && t.strides[1] == width && t.strides[0] == width * c.tokens;
  if (!fits) {
    python.drop(tensor);
    return nullptr;
  }
  *data = t.at();
  return tensor;
}

// Nothing around the call looks at its operators or changes them.
bool nobody_looks(const Quick& q) {
  for (int i = 0; i < kAsked && q.ask[i]; ++i) {
    Object* said = python.call(q.ask[i], q.empty_tuple, nullptr);
    if (!said) return false;
    python.drop(said);  // one of the objects that live as long as the interpreter, or not the answer
    if (said != q.answer[i]) return false;
  }
  return true;
}

bool nothing_changed(const Quick& q) {
  for (int64_t i = 0; i < q.line_count; ++i) __builtin_prefetch(q.lines[i], 0, 2);
  return bk_same_words(q.addresses, q.words, 0, q.word_count) == q.word_count &&
         (!q.range_count || bk_same_bytes(q.ranges, q.range_count)) &&
         (!q.source_count || bk_same_bytes(q.sources, q.source_count));
}

// Logits, uninitialized; null with or without an error.
Object* new_logits(const Quick& q, int64_t keep, char** data) {
  Object* kept = python.long_of(keep);
  if (!kept) return nullptr;
  Object* shape = python.tuple(3, q.batch_of, kept, q.vocabulary_of);
  python.drop(kept);
  if (!shape) return nullptr;
  Object* tensor = python.call(q.empty, shape, q.options);
  python.drop(shape);
  DLTensor t;
  if (tensor && (python.describe(tensor, &t) || !t.data)) {
    python.drop(tensor);
    return nullptr;
  }
  if (tensor) *data = t.at();
  return tensor;
}

struct Held {
  Object* object;
  ~Held() {
    if (object) python.drop(object);
  }
};

Object* answer(const Quick& q, Object* kwargs) {
  Call c;
  if (!understand(q, kwargs, &c) || !read_tokens(q, &c) || !read_mask(q, &c) || !read_positions(q, &c)) return nullptr;
  if (!nobody_looks(q) || !nothing_changed(q)) return nullptr;

  RunInput in{};
  in.program = q.program;
  in.hidden = q.hidden;
  Held hidden{q.embed ? embedded(q, c, &in.hidden) : nullptr};
  if (q.embed ? !hidden.object : !embed(q, c)) return nullptr;
  in.hidden_type = (Type)q.hidden_type;
  in.threads = torch::stable::get_num_threads();
  in.run.batch = q.batch, in.run.tokens = c.tokens, in.run.past = q.lease->past, in.run.keep = c.keep;
  in.run.positions = c.positions;
  in.run.starts = c.padded ? c.starts : nullptr;
  in.run.caches = q.lease->rows;
  std::copy(q.angles, q.angles + q.program->angles, in.run.angles);
  calm_neighbours(in.threads);

  char* data = nullptr;
  Object* logits = new_logits(q, c.keep, &data);
  if (!logits) return nullptr;
  Place* place = nullptr;
  bool done = false;
  void* state = python.release();
  try {
    if (program_start(in, &place).empty()) {
      program_step(place);
      int64_t rows, width;
      const float* values = program_value(place, q.program->logits, false, &rows, &width);
      if (values && rows == q.batch * c.keep && width == q.vocabulary) {
        if ((Type)q.logits_type == Type::f32)
          std::memcpy(data, values, rows * width * 4);
        else
          table().convert((Type)q.logits_type, true, values, data, rows * width);
        done = true;
      }
    }
  } catch (...) {  // no memory: the others say so
  }
  if (place) program_finish(place);
  python.restore(state);
  if (!done) {
    python.drop(logits);
    return nullptr;
  }
  advance(*q.lease, c.tokens);
  return logits;
}

}  // namespace
}  // namespace bigkernels

#define BK_EXPORT extern "C" __attribute__((visibility("default")))

// Once a process, before anything else here.
BK_EXPORT void bk_quick_setup(const bigkernels::Interpreter* functions) { bigkernels::python = *functions; }

// METH_O: `self` is a tuple of the address of a Quick and of what that points to; the argument, a call's keywords.
BK_EXPORT void* bk_quick(void* self, void* kwargs) {
  using namespace bigkernels;
  const Quick& q = *(const Quick*)python.as_long(python.tuple_item(self, 0));
  if (Object* logits = answer(q, kwargs)) return logits;
  python.clear_error();
  python.keep(q.none);
  return q.none;
}
