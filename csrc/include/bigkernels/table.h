// The CPU kernels as plain functions, and the table that holds one ISA level's copies of them.
//
// Kernel files are compiled once per level and include neither torch nor the C++ library: an inline function or
// template emitted with AVX-512 could otherwise be the copy that the linker keeps for an AVX2 machine.
#pragma once
#include <cstdint>

#include "activations.h"
#include "codes.h"
#include "optimizer.h"

namespace bigkernels {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int64_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Rows of `d` elements, each contiguous, the next one `stride` elements further on.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Sums over rows, one for each column, of the blocks of rows that threads work on: (blocks, d), zeroed by the caller. A
// few rows are added up in float32 before they go into the total: adding thousands of rows one by one would lose
// digits.
struct ColumnSums {
  float* recent = nullptr;  // null where the gradient is not wanted
  double* total = nullptr;
};

struct RmsNorm {
  Rows x, residual, grad, grad_total;  // residual and grad_total: null when absent
  const float* weight = nullptr;       // with the offset added; null: all 1
  void* out = nullptr;                 // (rows, d) contiguous: y, or dx
  void* total = nullptr;               // x + residual
  float* rstd = nullptr;               // forward: null where no backward follows
  ColumnSums dweight;
  int64_t d = 0;
  float eps = 0;
  Type type = Type::f32;
  bool stream = false;  // outputs larger than the cache: store past it
};

struct LayerNorm {
  Rows x, residual, grad, grad_total;
  const float* weight = nullptr;
  const float* bias = nullptr;
  void* out = nullptr;
  void* total = nullptr;
  float* mean = nullptr;
  float* rstd = nullptr;
  ColumnSums dweight;
  ColumnSums dbias;
  int64_t d = 0;
  float eps = 0;
  Type type = Type::f32;
  bool stream = false;
};

// The cosine and sine that turn the first `rotary` elements of a token's heads.
struct Angles {
  const void* cos;
  const void* sin;
  int64_t cos_batch, cos_token, sin_batch, sin_token;  // strides in elements
  int64_t rotary;
  Type type;
  bool interleaved;
};

struct Rope {
  struct Heads {
    const void* in;
    void* out;
    int64_t heads, in_batch, in_head, in_token, out_batch, out_head, out_token;  // strides in elements
  };
  Heads q, k;
  Angles angles;
  int64_t length, d;
  Type type;
  bool inverse;
};

struct Glu {
  Rows gate, up, grad;
  void* out;   // activation(gate) * up, or the gradient of gate
  void* out2;  // the gradient of up
  int64_t n;   // elements a row
  Type type;
  Activation activation;
  bool stream;
};

struct CrossEntropy {
  Rows logits;
  const int64_t* target;
  const float* weight;        // (V,) or null
  const float* token_weight;  // (T,) or null
  float* loss;                // (T,) forward
  float* lse;                 // (T,)
  float* divisor;             // (T,) forward: the class weight of each token kept
  int64_t* predicted;         // (T,) forward, or null: the first class of the largest logit, -1 for ignored tokens
  const float* grad;          // one value, or (T,) with grad_stride 1
  int64_t grad_stride;
  float grad_scale;  // 1 / divisor for "mean"
  float weight_sum;  // of all classes
  void* out;         // (T, V) gradient
  int64_t vocabulary, ignore_index;
  float label_smoothing, z_loss, softcap, focal_gamma;
  Type type;
  bool stream;
};

struct Attention {
  // (batch, head, token, element) with strides in elements; a head's values are contiguous. Packed sequences have batch
  // 0.
  struct Heads {
    void* data;
    int64_t batch, head, token;
  };
  // (batch, head, query, key), broadcast where a stride is 0.
  struct Scores {
    const void* data;
    int64_t batch, head, query, key;
  };
  Heads q, k, v, out;                  // backward reads out
  Heads grad, grad_q, grad_k, grad_v;  // backward
  Heads k_scale, v_scale;              // of an int8 cache: float32, one value a head of a token
  Scores bias, mask;                   // null where absent; the mask is of bytes, 0 hides a key
  float* lse;                          // (batch, head, query), queries contiguous
  const float* grad_lse;               // null where absent; strides as lse
  int64_t lse_batch, lse_head;
  const float* alibi;       // (H,) or null
  const float* sinks;       // (H,) or null
  const int32_t* prefix;    // (B,) or null
  const int32_t* starts_q;  // (B + 1,) for packed sequences, else null
  const int32_t* starts_k;
  double* grad_sinks;  // (batch, head) sums, or null
  void* grad_bias;     // the gradient of bias, in its type and shape, contiguous
  int64_t batches, bias_size[4];
  int64_t heads, groups, queries, keys, d, dv;
  int64_t left, right;  // of the window; -1 is unlimited
  uint64_t seed;
  uint32_t threshold;  // a random word below it drops its weight
  float scale, softcap, dropout_p;
  Type type, bias_type;
  bool floats;  // q and out are float32, whatever the type of k and v; without gradients
  bool int8;    // k and v; q and out have `type`, or are float32
};

// The query heads of one key head in one sequence, and rows of them: row r is query r / G of head r % G in the group.
struct AttentionTask {
  int64_t batch, group, begin, end;
};

// Attention of few queries over many keys, which may lie in pages: then the batches of k and v are pages.
struct DecodeAttention : Attention {
  const int32_t* lengths;      // (B,) the keys of each sequence; null: all have `keys`
  const int32_t* block_table;  // key j of sequence b is token j % page of page block_table[b * table_stride + j / page]
  int64_t table_stride, page;
};

// Writes the last `queries` keys and values of each sequence into its cache, k and v, and rotates q into out.
struct AppendKv : DecodeAttention {
  Heads new_k, new_v;
  Angles angles;  // of no elements where nothing is rotated
};

// The keys [begin, end) of one sequence, for some of its queries and some heads of k and v. Row r of such a head is
// query first_query + r / G of its query head r % G.
struct DecodePart {
  int64_t batch, group, groups, first_query, queries, begin, end;
  float* state;  // what the keys add up to, to be merged with other parts; null: this part is all there is
};

constexpr int64_t kDecodeParts = 256;

struct DecodeSizes {
  int64_t workspace;  // bytes a thread
  int64_t state;      // floats a part
};

// A weight (N, K) as it is stored (codes.h).
struct Weight {
  int64_t n, k;
  Codes kind;
  const uint8_t* codes;
  int64_t code_row;  // bytes
  const void* scale;
  const uint16_t* zero;
  const float* row_scale;
  const float* book;
  int64_t group, groups;  // of elements of a row; 0 where a row has one scale
  bool transposed;        // numbers only: element k of row n is element n of stored row k
  // Step programs: a copy of codes and scales, 16 rows after 16 rows, panel_step bytes from one to the next, in the
  // order in which products read them (csrc/cpu/kernels/product_stored.h); null: there is none.
  const uint8_t* panels;
  int64_t panel_step;
};

// y = x w^T + bias, (M, N), or backward the gradient of x, (M, K), from that of y. The gradient of a weight is such a
// backward pass too: of the transposed gradient of y, with x for a weight.
struct Linear : Weight {
  Rows in;             // x, or the gradient of y
  bool in_transposed;  // element i of row m is element m of row i
  void* out;           // contiguous
  Type type;           // of in
  Type out_type;
  int64_t m;
  const float* bias;   // (N,) or null
  bool stream;         // write past the caches
  const void* packed;  // the whole weight as linear_pack_right makes it for this type, forward; null: not at hand
};

// Cross entropy of the logits `logit_scale * (x w^T + bias)`, which are made a block at a time. All pointers to tokens
// are to the `tokens` that count, in their order; `row` says where they are in x and dx.
struct LinearCrossEntropy {
  Linear head;  // the weight; in: x; type; bias
  const int64_t *row, *target;
  const float* weight;  // (V,) of the classes, or null
  int64_t tokens, chunk, vocabulary;
  float label_smoothing, z_loss, softcap, focal_gamma, logit_scale, weight_sum;  // no softcap with label smoothing
  float *loss, *lse;
  int64_t* predicted;  // (T,) or null: the first class of the largest logit; NaN counts as larger than all, as in torch
  // What backward reads: the gradient of logit j is coefficient * e[j] - beta * weight[j], with e = exp(z - shift), and
  // at the target pull - beta * weight[target].
  float *shift, *coefficient, *pull, *beta;
  // (T, K), or null: the gradient of each token's loss, times a power of two where float16 would lose it.
  void* dx;
  float* unit;
  const float* smoothed;  // (K,) sum of weight[j] w[j], with label smoothing
  // The gradient of the weight, (V, K). Until it is written, its rows hold e of the first `saved` row blocks of 32
  // tokens, where they have room for it: chunks whose `kept` is set.
  void* dw;
  Type dw_type;
  int64_t saved;
  uint8_t* kept;
  // Backward: `transposed` holds factor * coefficient / top * x, and `factor` the gradient of each token's loss.
  const void* transposed;
  const float* factor;
  float top, beta_sum;    // sum of factor * beta
  const float* beta_x;    // (K,) sum of factor * beta * x
  const int64_t* sorted;  // tokens by target, and where the tokens of each block of the vocabulary begin
  const int64_t* first;
  float* dbias;  // (V,) or null
};

// Values and their codes of 8 bits with a scale a block, in either direction; rows of the kernels are blocks.
constexpr int64_t kCompressBlock = 128;
struct Compress {
  void* values;
  uint8_t* codes;
  float* scale;
  int64_t n;
  Type type;  // of the values
  bool fp8;   // e4m3, else integers
  bool stochastic, stream;
  uint32_t key;  // of the random numbers
};

// A kernel over the rows [begin, end) of its arguments; `block` numbers the partial sums it adds to.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);
template <class Args>
using BlockKernel = void (*)(const Args&, int64_t begin, int64_t end, int64_t block);

struct CpuTable {
  Kernel<RmsNorm> rms_norm_fwd;
  BlockKernel<RmsNorm> rms_norm_bwd;
  Kernel<LayerNorm> layer_norm_fwd;
  BlockKernel<LayerNorm> layer_norm_bwd;
  Kernel<Rope> rope;
  Kernel<Glu> glu_fwd;
  Kernel<Glu> glu_bwd;
  Kernel<CrossEntropy> cross_entropy_fwd;
  Kernel<CrossEntropy> cross_entropy_bwd;
  // Forward: the rows of a task. Bytes of workspace for tasks of so many rows.
  void (*attention_fwd)(const Attention&, const AttentionTask&, void* workspace);
  int64_t (*attention_fwd_workspace)(const Attention&, int64_t rows);
  // Backward of one unit in three steps: its rows made ready in `memory`, its keys, and what is summed over the keys.
  // The keys may be cut into several tasks, each with a slab of its own in `memory`.
  void (*attention_bwd_rows)(const Attention&, const AttentionTask& rows, int64_t splits, void* memory);
  void (*attention_bwd_keys)(const Attention&, const AttentionTask& keys, int64_t split, int64_t splits, void* memory,
                             void* workspace);
  void (*attention_bwd_finish)(const Attention&, const AttentionTask& rows, int64_t splits, void* memory);
  int64_t (*attention_bwd_memory)(const Attention&, int64_t rows, int64_t splits);
  int64_t (*attention_bwd_workspace)(const Attention&);
  // The gradient of queries [begin, end) of head `group` and batch `batch` of the bias.
  void (*attention_bias_bwd)(const Attention&, const AttentionTask&, void* workspace);
  int64_t (*attention_bias_bwd_workspace)(const Attention&, int64_t queries);
  // What a call needs for parts of so many heads and queries; the attention of some parts; several parts of the same
  // rows, at most kDecodeParts, merged in their order: queries [begin, end) of theirs are written out.
  DecodeSizes (*decode_sizes)(const DecodeAttention&, int64_t groups, int64_t queries);
  void (*decode_attention)(const DecodeAttention&, const DecodePart*, int64_t count, void* workspace);
  void (*decode_merge)(const DecodeAttention&, const DecodePart*, int64_t count, int64_t begin, int64_t end);
  Kernel<AppendKv> append_kv;  // rows: the new tokens of all sequences
  // A few tokens: x made ready once, then rows [begin, end) of the weight. Bytes of what is made ready.
  void (*linear_few_prepare)(const Linear&, void* ready);
  void (*linear_few)(const Linear&, const void* ready, int64_t begin, int64_t end);
  int64_t (*linear_few_size)(const Linear&);
  int64_t (*linear_few_most)(const Linear&);  // tokens up to which this is the faster way
  // Many tokens, forward or backward: row blocks [begin, end) of 32 tokens packed into `left`, then columns [begin,
  // end) of the result for all of them. Bytes of `left` a row block, and of workspace for so many columns.
  void (*linear_pack_left)(const Linear&, bool backward, int64_t begin, int64_t end, void* left);
  void (*linear_many)(const Linear&, bool backward, const void* left, int64_t begin, int64_t end, void* workspace);
  int64_t (*linear_row_block_bytes)(const Linear&, bool backward);
  int64_t (*linear_workspace)(const Linear&, int64_t columns);
  // Row blocks [begin, end) of 32 rows of the weight, packed for forward; bytes a row block.
  void (*linear_pack_right)(const Linear&, int64_t begin, int64_t end, void* packed);
  int64_t (*linear_packed_row_block_bytes)(const Linear&);
  // Forward of chunk `chunk` of the tokens; what backward needs of row blocks [begin, end); the gradients of block
  // `block` of the vocabulary; dx of tokens [begin, end) times their factors. Sizes in bytes; the vocabulary in a
  // block, and the bytes that 32 by 32 values of e take.
  void (*linear_loss_tokens)(const LinearCrossEntropy&, int64_t chunk, void* workspace);
  void (*linear_loss_transpose)(const LinearCrossEntropy&, int64_t begin, int64_t end, void* transposed);
  void (*linear_loss_weight)(const LinearCrossEntropy&, int64_t block, void* workspace);
  void (*linear_loss_scale)(const LinearCrossEntropy&, int64_t begin, int64_t end);
  int64_t (*linear_loss_tokens_size)(const LinearCrossEntropy&);
  int64_t (*linear_loss_row_block_bytes)(const LinearCrossEntropy&);
  int64_t (*linear_loss_weight_size)(const LinearCrossEntropy&);
  int64_t (*linear_loss_block)(const LinearCrossEntropy&);
  // linear_many forward with tokens rounded to 8 bits, and int8 codes; `token` is room for one.
  void (*linear_dynamic_pack)(const Linear&, int64_t begin, int64_t end, void* left, float* scales, void* token);
  void (*linear_dynamic)(const Linear&, const void* left, const float* scales, int64_t begin, int64_t end,
                         void* workspace);
  int64_t (*linear_dynamic_row_block_bytes)(const Linear&);
  int64_t (*linear_dynamic_token)(const Linear&);
  int64_t (*linear_dynamic_workspace)(const Linear&, int64_t columns);
  Kernel<Compress> compress;
  Kernel<Compress> decompress;
  // A chunk of a parameter; LAMB's first pass over it, with the sums of squares of parameter and direction; the sum of
  // squares or the largest magnitude of a gradient.
  void (*optimizer_step)(Algorithm, const OptimizerTensor&, const OptimizerGrad&, const OptimizerScalars&,
                         const OptimizerChunk&);
  void (*optimizer_measure)(const OptimizerTensor&, const OptimizerGrad&, const OptimizerScalars&,
                            const OptimizerChunk&, double* sums);
  double (*optimizer_norm)(const OptimizerGrad&, const OptimizerChunk&, bool infinity);
  // White-box access for tests and the benchmark engine.
  void (*vector_math)(int function, const float* in, float* out, int64_t n);
  void (*convert)(Type type, bool narrow, const void* in, void* out, int64_t n);
  void (*copy)(const void* in, void* out, int64_t bytes, bool stream);
  float (*sum_of)(const void* in, int64_t bytes, int streams);
  void (*update)(void* param, void* first, void* second, const void* grad, int64_t bytes, bool ahead);  // bytes of each
  int64_t (*matrix_loop)(int type, int64_t rounds);  // operations done; 0 where the level has no such unit
  // Row n of a weight in blocks: (k,).
  void (*decode_row)(const Weight&, int64_t n, float* out);
};

constexpr int64_t kLossVocabulary = 256;  // in a block of linear_loss_*

const char* isa_name();   // of the level that is chosen once, from cpuid and BIGKERNELS_CPU_ISA
const CpuTable& table();  // the chosen level's

}  // namespace bigkernels
