// A model's step as records: what a token passes through, from its hidden state to its logits, in plain structs that
// one call walks with a team of threads (csrc/cpu/program.cpp).
//
// Values between records are rows of float32, one row a token: `batch` sequences of `tokens` new tokens each, row
// b * tokens + s. Weights are read where the model keeps them: records hold addresses. Of codes there may be a copy
// beside them, in panels, which products read instead: whoever has it made watches the codes. Every record writes
// values of its own, so that two threads that make the same chunk write the same bits.
//
// bigkernels/program/_records.py has the same structs for Python; tests compare their sizes.
#pragma once
#include "table.h"

namespace bigkernels {

typedef int32_t Value;  // its number in the program's list; -1: none

// A vector that the model keeps, read as it is stored; data null: absent.
struct Vector {
  const void* data;
  Type type;
  int32_t pad;
};

enum class NormKind : int32_t { none = 0, rms = 1, layer = 2 };

struct NormOf {
  NormKind kind;
  float eps;
  float offset;  // added to the weight
  int32_t pad;
  Vector weight, bias;
};

enum class Op : int32_t {
  norm = 0,      // out = scale * norm(x) + residual, over groups of `size` columns
  combine = 1,   // out = sum of scale[i] * x[i], cut at +-limit where that is not 0
  activate = 2,  // out = scale * activation(x) * up; softcap
  product = 3,   // out = epilogue(x w^T + bias)
  heads = 4,     // norms and rotates queries and keys; keys and values go to the cache
  attend = 5,    // attention over the cache
  experts = 6,   // routed gated units
  keep = 7,      // the last `keep` rows of each sequence; what follows has batch * keep rows
  call = 8,      // a stop, at which the model's own code reads and writes values
  turn = 9,      // norms and rotates heads: a value of an encoder's queries or keys
  mix = 10,      // attention inside of the run's own sequences
};

struct NormRecord {
  Value x, out, residual;
  int32_t pad;
  int64_t size;  // columns that are normed together; divides the width of x
  NormOf norm;   // weight and bias have `size` elements
  float scale, residual_scale;
};

constexpr int kMaxTerms = 4;
struct CombineRecord {
  Value out;
  int32_t count;
  Value x[kMaxTerms];
  float scale[kMaxTerms];
  Vector channel[kMaxTerms];  // (width,), multiplied with its term; absent: 1
};

struct ActivateRecord {
  Value x, up, out;  // up: none, or what the activation is multiplied with
  Activation act;
  int32_t x_column, up_column;  // where in x and up the operands begin, for halves of one value
  int32_t width;                // of out
  float scale, softcap;         // out = softcap * tanh(out / softcap) at the end; 0: none
  float limit;                  // gpt-oss: x is cut at limit, up at +-limit; 0: none
  float alpha;                  // of quick_gelu, x * sigmoid(alpha x)
  float up_offset;              // added to up
};

// Weights that share an input, and where their rows go. With `gated` there are two, and
// out[0] = act(y[0]) * y[1]; else out[i] = out_scale * act(y[i]) + residual_scale * residual.
constexpr int kMaxWeights = 4;
struct ProductRecord {
  Value x;
  int32_t count;
  Value out[kMaxWeights];
  int32_t column[kMaxWeights];  // of out at which row 0 of a weight goes
  Weight weight[kMaxWeights];
  Vector bias[kMaxWeights];
  Activation act;
  int32_t gated;
  int32_t integers;  // as ProgramTable::product takes it
  Value residual;    // the width of out[0]
  float out_scale, residual_scale;
  int32_t x_column;  // where in x the input begins
  int32_t pad;
};

// Head h of a row is the `d` columns of value x from column[h] on.
struct HeadsOf {
  Value x;
  int32_t count;
  const int32_t* column;
};

struct HeadsRecord {
  HeadsOf q, k, v;  // k and v of no heads: the layer reads another layer's cache
  Value out;        // (q.count * d) rotated queries
  int32_t layer;    // of the cache
  int32_t d, dv;
  NormOf q_norm, k_norm;  // of d elements
  int32_t angles;         // number in the run's list; -1: nothing is rotated
  int32_t rotary;         // the first elements of a head that are
  int32_t interleaved;
  int32_t pad;
};

struct AttendRecord {
  Value q, out;  // (heads * d), (heads * dv)
  int32_t layer;
  int32_t heads, groups;  // query heads, and key heads
  int32_t d, dv;
  float scale, softcap;
  int32_t pad;
  int64_t window;      // keys that a token sees, itself included; 0: all
  Vector sinks;        // (heads,)
  const float* alibi;  // (heads,): adds slope * (key - query); null: none
  Value state;         // -1: the runner has room for the sums of parts of long caches at v[-1]; or a value of their own
  int32_t pad2;
};

// out[row] = residual + sum over its `top` experts e, in their order, of weight * down_e(act(gate_e x) * up_e x).
struct ExpertsRecord {
  Value x, out;
  Value logits;           // (experts) of the router; none where weights and chosen are made by the model's own code
  Value weights, chosen;  // (top) each; chosen holds whole numbers, and what is no expert's counts for nothing
  Value hidden;           // (top * inner): what goes into down
  Value residual;
  int32_t experts, top, inner;
  int32_t renormalize;  // the chosen weights of a row to sum 1
  int32_t sigmoid;      // of the logits instead of softmax
  float scale;          // of the weights
  Activation act;
  int32_t integers;                // as in ProductRecord
  const Weight *gate, *up, *down;  // one an expert; up null: it is in gate, whose rows are gate's and up's in turn
  const Vector *gate_bias, *up_bias, *down_bias;  // likewise, or null
  int32_t plain;                                  // there is no up: act(gate_e x)
  float limit, alpha, up_offset;                  // as in ActivateRecord
};

struct KeepRecord {
  Value x, out;
};

struct CallRecord {
  int32_t reads, writes;
  const Value *x, *out;
};

// out: the heads of x, (x.count * d), normed and rotated.
struct TurnRecord {
  HeadsOf x;
  Value out;
  int32_t d;
  NormOf norm;     // of d elements
  int32_t angles;  // as in HeadsRecord
  int32_t rotary;
  int32_t interleaved;
  int32_t pad;
};

// Attention of each token over those of its own sequence: nothing is kept. Head h of keys and values is that of group
// h.
struct MixRecord {
  HeadsOf q, k, v;  // heads at equal distances
  Value out;        // (heads * dv)
  int32_t heads, groups, d, dv;
  float scale, softcap;
  int32_t causal;  // a token sees itself and those before it
  int32_t scores;  // number in the run's list; -1: nothing is hidden by what the caller gives, and nothing added
  Type type;       // to which keys and values are rounded
  Vector sinks;    // (heads,)
};

struct Record {
  Op op;
  int32_t pad;
  union {
    NormRecord norm;
    CombineRecord combine;
    ActivateRecord activate;
    ProductRecord product;
    HeadsRecord heads;
    AttendRecord attend;
    ExpertsRecord experts;
    KeepRecord keep;
    CallRecord call;
    TurnRecord turn;
    MixRecord mix;
  };
};

// The header, and after it in the same memory its records and widths. `id` names this content: no two programs of a
// process share one, and a program whose records are changed gets another.
constexpr int kMaxAngles = 4;
struct ProgramHeader {
  int64_t id;
  int32_t records, values, layers, angles;
  Value hidden, logits;  // what goes in, and comes out
  int32_t scores;        // of a run's list
  int32_t pad;
  const int32_t* width;  // of each value
  const Record* record;
};

// ---- one call -------------------------------------------------------------------------------------------------------

// cos and sin as rows of `rotary` elements (both halves, as Hugging Face models make them), indexed by a token's
// position or, with `by_row`, by its row.
struct AngleTable {
  const void *cos, *sin;
  Type type;
  int32_t by_row;
  int64_t stride;  // elements
  int64_t rows;
};

// The keys and values of a layer, with room for the new tokens: token s of sequence b is written at slot held + s, and
// sees slots up to its own. Slot j holds the token that is `past - held + j` from the beginning. There are `capacity`
// slots.
struct LayerCache {
  void *k, *v;
  int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides in elements; a head's values are contiguous
  int64_t held, capacity;
  Type type;     // of numbers
  int32_t bits;  // 0: numbers; 8: int8 with a float32 scale a token and head
  float *k_scale, *v_scale;
  int64_t scale_batch, scale_head;  // strides; the next token is the next scale
};

// What a caller says of attention's scores: which keys a query sees, by numbers of the tokens in their sequence, and
// what is added. (batch, head, query, key) with strides in elements, 0 where it is the same for all.
struct ScoresTable {
  const void* mask;  // bytes, 0 hides a key; null: none
  int64_t mask_batch, mask_head, mask_query, mask_key;
  const void* bias;  // of `type`; null: none
  int64_t bias_batch, bias_head, bias_query, bias_key;
  int64_t left, right;  // keys before and after a query that it sees; -1: all
  Type type;
  int32_t pad;
};

struct Run {
  int64_t batch, tokens, past;
  int64_t keep;              // rows a sequence after Op::keep
  const int64_t* positions;  // (batch, tokens)
  const int64_t* starts;     // (batch,) the first token that is no padding, or null
  AngleTable angles[kMaxAngles];
  const LayerCache* caches;
  // Programs of encoders: a batch of one, whose rows are those of `sequences` sequences one after the other. Sequence i
  // is rows [offsets[i], offsets[i + 1]), and number numbers[i] of the batch that `scores` are of.
  int64_t sequences;
  const int64_t *offsets, *numbers;
  const ScoresTable* scores;
  int64_t rows() const { return batch * tokens; }
};

// How far a run is, and the step that somebody is making of it. That step is past where `*at` is larger.
struct Progress {
  const int64_t* at;
  int64_t step;
};

// chunks, floats of state that all of them leave (0: keys are not cut), and bytes of workspace a thread.
struct AttendPlan {
  int64_t chunks, parts, rows, keys;  // parts: of the keys; rows: queries of a chunk; keys: of a part
  int64_t state, workspace;
};

// ---- kernels: one level's copies, csrc/cpu/kernels/program_*.cpp
// ------------------------------------------------------

// Rows [begin, end) of a chunk; `v` has the address of each value's row 0, and values are rows of their width. Several
// threads may run the same chunk, while others read what the first of them has made: each element of an output is
// written once, with its last bits, and outputs are no room for anything else.
struct ProgramTable {
  void (*norm)(const NormRecord&, float* const* v, const int32_t* width, int64_t begin, int64_t end);
  // Elements [begin, end) of out, counted over its rows.
  void (*combine)(const CombineRecord&, float* const* v, const int32_t* width, int64_t begin, int64_t end);
  void (*activate)(const ActivateRecord&, float* const* v, const int32_t* width, int64_t begin, int64_t end);
  // What comes after a product: rows [begin, end) of weight i, y (m, end - begin) at `stride`, get their bias,
  // activation, scale and residual and go to their place in out. With `gated` i is 0 and `up` is y of weight 1.
  void (*finish)(const ProductRecord&, int i, const float* y, const float* up, int64_t stride, int64_t m,
                 float* const* v, const int32_t* width, int64_t begin, int64_t end);
  // Products. Tokens [begin, end) of m are made ready once for all weights of one form; then rows [begin, end) of a
  // weight are multiplied with all m tokens: out[t * stride + row - begin], in float32 and without the bias. Sizes in
  // bytes. `integers` says what becomes of tokens that meet codes: 0, nothing; 1, they are rounded to 8 bits per 32
  // values (to bfloat16 for fp8 and book4); 2, to bfloat16. With weights of bfloat16 they always are.
  int32_t (*product_form)(const Weight&, int32_t integers);
  int64_t (*product_ready)(const Weight&, int32_t integers, int64_t m);
  void (*product_prepare)(const Weight&, int32_t integers, const float* x, int64_t stride, int64_t m, int64_t begin,
                          int64_t end, void* ready);
  int64_t (*product_workspace)(const Weight&, int32_t integers, int64_t m, int64_t rows);
  void (*product)(const Weight&, int32_t integers, const void* ready, int64_t m, int64_t begin, int64_t end, float* out,
                  int64_t stride, void* workspace);
  // Bytes of a panel of 16 rows of a weight, a multiple of 64; 0: products read it as it is stored. Then panels
  // [begin, end), to their place.
  int64_t (*panel_bytes)(const Weight&, int32_t integers);
  void (*make_panels)(const Weight&, int64_t begin, int64_t end);
  // Experts: rows [begin, end) of a router's logits to weights and numbers; what products with an expert's gate and up
  // have given for m tokens, units [begin, end), to the places of the tokens' units; and the same of its down, times
  // weights, added to m places of sums.
  void (*route)(const ExpertsRecord&, float* const* v, int64_t begin, int64_t end);
  void (*units)(const ExpertsRecord&, int64_t expert, const float* y, const float* up, int64_t stride, int64_t m,
                float* const* to, int64_t begin, int64_t end);
  void (*expert_sum)(const ExpertsRecord&, int64_t expert, const float* y, int64_t stride, int64_t m, float* const* to,
                     const float* weight, int64_t begin, int64_t end);
  // Tokens [begin, end): queries to their value, keys and values to the cache, but by nobody whose run is past this
  // step: then the cache is the caller's again, and what a norm's weight is may have changed.
  void (*heads)(const HeadsRecord&, const Run&, float* const* v, const int32_t* width, int64_t begin, int64_t end,
                const Progress*);
  // Attention: how a record is cut for a run, and one chunk of it. Where keys are cut, chunks leave sums in `state`,
  // and merge makes rows [begin, end) of out.
  AttendPlan (*attend_plan)(const AttendRecord&, const Run&, int64_t threads);
  void (*attend)(const AttendRecord&, const Run&, const AttendPlan&, int64_t chunk, float* const* v,
                 const int32_t* width, void* workspace);
  void (*attend_merge)(const AttendRecord&, const Run&, const AttendPlan&, float* const* v, const int32_t* width,
                       int64_t begin, int64_t end);
  // Encoders: heads of tokens [begin, end); and attention of units [begin, end), which are sequences by groups.
  void (*turn)(const TurnRecord&, const Run&, float* const* v, const int32_t* width, int64_t begin, int64_t end);
  int64_t (*mix_workspace)(const MixRecord&, const Run&);
  void (*mix)(const MixRecord&, const Run&, float* const* v, const int32_t* width, int64_t begin, int64_t end,
              void* workspace);
};

const ProgramTable& program_table();  // the chosen level's

}  // namespace bigkernels
