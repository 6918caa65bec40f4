// This level's table, and the loops that tests and the benchmark engine call directly.
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {

void rms_norm_fwd(const RmsNorm&, int64_t, int64_t);
void rms_norm_bwd(const RmsNorm&, int64_t, int64_t, int64_t);
void layer_norm_fwd(const LayerNorm&, int64_t, int64_t);
void layer_norm_bwd(const LayerNorm&, int64_t, int64_t, int64_t);
void rope(const Rope&, int64_t, int64_t);
void glu_fwd(const Glu&, int64_t, int64_t);
void glu_bwd(const Glu&, int64_t, int64_t);
void cross_entropy_fwd(const CrossEntropy&, int64_t, int64_t);
void cross_entropy_bwd(const CrossEntropy&, int64_t, int64_t);
void attention_fwd(const Attention&, const AttentionTask&, void*);
int64_t attention_fwd_workspace(const Attention&, int64_t);
void attention_bwd_rows(const Attention&, const AttentionTask&, int64_t, void*);
void attention_bwd_keys(const Attention&, const AttentionTask&, int64_t, int64_t, void*, void*);
void attention_bwd_finish(const Attention&, const AttentionTask&, int64_t, void*);
int64_t attention_bwd_memory(const Attention&, int64_t, int64_t);
int64_t attention_bwd_workspace(const Attention&);
void attention_bias_bwd(const Attention&, const AttentionTask&, void*);
int64_t attention_bias_bwd_workspace(const Attention&, int64_t);
DecodeSizes decode_sizes(const DecodeAttention&, int64_t groups, int64_t queries);
void decode_attention(const DecodeAttention&, const DecodePart*, int64_t count, void* workspace);
void decode_merge(const DecodeAttention&, const DecodePart*, int64_t count, int64_t begin, int64_t end);
void append_kv(const AppendKv&, int64_t, int64_t);
void decode_blocks_row(const Weight&, int64_t, float*);
void linear_few_prepare(const Linear&, void*);
void linear_few(const Linear&, const void*, int64_t, int64_t);
int64_t linear_few_size(const Linear&);
int64_t linear_few_most(const Linear&);
void linear_pack_left(const Linear&, bool, int64_t, int64_t, void*);
void linear_many(const Linear&, bool, const void*, int64_t, int64_t, void*);
int64_t linear_row_block_bytes(const Linear&, bool);
int64_t linear_workspace(const Linear&, int64_t);
void linear_pack_right(const Linear&, int64_t, int64_t, void*);
int64_t linear_packed_row_block_bytes(const Linear&);
void linear_loss_tokens(const LinearCrossEntropy&, int64_t, void*);
void linear_loss_transpose(const LinearCrossEntropy&, int64_t, int64_t, void*);
void linear_loss_weight(const LinearCrossEntropy&, int64_t, void*);
void linear_loss_scale(const LinearCrossEntropy&, int64_t, int64_t);
int64_t linear_loss_tokens_size(const LinearCrossEntropy&);
int64_t linear_loss_row_block_bytes(const LinearCrossEntropy&);
int64_t linear_loss_weight_size(const LinearCrossEntropy&);
int64_t linear_loss_block(const LinearCrossEntropy&);
void linear_dynamic_pack(const Linear&, int64_t, int64_t, void*, float*, void*);
void linear_dynamic(const Linear&, const void*, const float*, int64_t, int64_t, void*);
int64_t linear_dynamic_row_block_bytes(const Linear&);
int64_t linear_dynamic_token(const Linear&);
int64_t linear_dynamic_workspace(const Linear&, int64_t);
void compress(const Compress&, int64_t, int64_t);
void decompress(const Compress&, int64_t, int64_t);
void optimizer_step(Algorithm, const OptimizerTensor&, const OptimizerGrad&, const OptimizerScalars&,
                    const OptimizerChunk&);
void optimizer_measure(const OptimizerTensor&, const OptimizerGrad&, const OptimizerScalars&, const OptimizerChunk&,
                       double*);
double optimizer_norm(const OptimizerGrad&, const OptimizerChunk&, bool infinity);
int64_t matrix_loop(int type, int64_t rounds);

namespace {

// function: 0 exp, 1 sigmoid, 2 tanh, 3 normal distribution, 4 normal density, 5 2^x
void vector_math(int function, const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    int64_t m = n - i < W ? n - i : W;
    vf x = load(in + i, m), density, y;
    switch (function) {
      case 0: y = vexp(x); break;
      case 1: y = vsigmoid(x); break;
      case 2: y = vtanh(x); break;
      case 3: y = vnormal(x, &density); break;
      case 5: y = vexp2(x); break;
      default: vnormal(x, &density), y = density; break;
    }
    store(out + i, y, m);
  }
}

template <class T>
void convert_of(bool narrow, const void* in, void* out, int64_t n) {
  int64_t i = 0;
  if (narrow) {
    for (; i + W <= n; i += W) store((T*)out + i, load((const float*)in + i));
    if (i < n) store((T*)out + i, load((const float*)in + i, n - i), n - i);
  } else {
    for (; i + W <= n; i += W) store((float*)out + i, load((const T*)in + i));
    if (i < n) store((float*)out + i, load((const T*)in + i, n - i), n - i);
  }
}

void convert(Type type, bool narrow, const void* in, void* out, int64_t n) {
  type == Type::bf16 ? convert_of<bf16>(narrow, in, out, n) : convert_of<f16>(narrow, in, out, n);
}

// What any kernel that reads and writes each byte once is limited by.
void copy(const void* in, void* out, int64_t bytes, bool stream) {
  const float* from = (const float*)in;
  float* to = (float*)out;
  int64_t n = bytes / 4, i = 0;
  if (stream) {
    for (; i + 2 * W <= n; i += 2 * W) stream2(to + i, load(from + i), load(from + i + W));
    fence();
  } else {
    for (; i + 2 * W <= n; i += 2 * W) store(to + i, load(from + i)), store(to + i + W, load(from + i + W));
  }
  for (; i < n; ++i) to[i] = from[i];
}

// What a kernel that only reads is limited by: the sum, over so many streams at once.
float sum_of(const void* in, int64_t bytes, int streams) {
  int64_t n = bytes / 4 / streams / (4 * W) * (4 * W);  // of a stream
  vf acc[4] = {};
  for (int64_t i = 0; i < n; i += 4 * W)
    for (int s = 0; s < streams; ++s) {
      const float* at = (const float*)in + s * n + i;
      for (int v = 0; v < 4; ++v) {
        if (v * W % 16 == 0) prefetch(at + 512 + v * W);
        acc[v] += load(at + v * W);
      }
    }
  return sum(acc[0] + acc[1] + acc[2] + acc[3]);
}

// What an optimizer is limited by: as AdamW does, arrays of `bytes` each are read and written where they are, from one
// that is only read.
void update(void* param, void* first, void* second, const void* grad, int64_t bytes, bool ahead) {
  float *p = (float*)param, *m = (float*)first, *v = (float*)second;
  const float* g = (const float*)grad;
  const vf half = splat(0.5f);
  auto step = [&](int64_t i) {
    vf x = load(g + i), a = (load(m + i) + x) * half, b = (load(v + i) + x * x) * half;
    store(m + i, a), store(v + i, b), store(p + i, load(p + i) - a * b);
  };
  int64_t n = bytes / 4 / (2 * W) * (2 * W);
  for (int64_t i = 0; i < n; i += 2 * W) {
    if (ahead) prefetch_ahead(p + i), prefetch_ahead(m + i), prefetch_ahead(v + i), prefetch_ahead(g + i);
    step(i), step(i + W);
  }
}

}  // namespace

extern const CpuTable table = {
    rms_norm_fwd,
    rms_norm_bwd,
    layer_norm_fwd,
    layer_norm_bwd,
    rope,
    glu_fwd,
    glu_bwd,
    cross_entropy_fwd,
    cross_entropy_bwd,
    attention_fwd,
    attention_fwd_workspace,
    attention_bwd_rows,
    attention_bwd_keys,
    attention_bwd_finish,
    attention_bwd_memory,
    attention_bwd_workspace,
    attention_bias_bwd,
    attention_bias_bwd_workspace,
    decode_sizes,
    decode_attention,
    decode_merge,
    append_kv,
    linear_few_prepare,
    linear_few,
    linear_few_size,
    linear_few_most,
    linear_pack_left,
    linear_many,
    linear_row_block_bytes,
    linear_workspace,
    linear_pack_right,
    linear_packed_row_block_bytes,
    linear_loss_tokens,
    linear_loss_transpose,
    linear_loss_weight,
    linear_loss_scale,
    linear_loss_tokens_size,
    linear_loss_row_block_bytes,
    linear_loss_weight_size,
    linear_loss_block,
    linear_dynamic_pack,
    linear_dynamic,
    linear_dynamic_row_block_bytes,
    linear_dynamic_token,
    linear_dynamic_workspace,
    compress,
    decompress,
    optimizer_step,
    optimizer_measure,
    optimizer_norm,
    vector_math,
    convert,
    copy,
    sum_of,
    update,
    matrix_loop,
    decode_blocks_row,
};

}  // namespace BK_ISA
}  // namespace bigkernels
