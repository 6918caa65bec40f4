// Bindings of attention and of attention over packed sequences: both fill one argument struct and cut it into tasks.
#include <bigkernels/stable.h>

#include <algorithm>
#include <cmath>

namespace bigkernels {
namespace {

// Of a forward task: many pay for packing the keys, but their float32 outputs have to stay in the second-level cache.
int64_t rows_of_task(const Attention& a) {
  return std::min<int64_t>(std::max<int64_t>((int64_t{1} << 17) / std::max(a.d, a.dv) / 32 * 32, 256), 2048);
}

struct Options {
  int64_t left, right;
  double scale, softcap, dropout_p;
};

Attention::Heads dense(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}
Attention::Heads packed(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), 0, x.stride(1), x.stride(0)};
}

// A tensor of integers as the kernels read it.
const int32_t* integers(const char* op, const char* name, const MaybeTensor& t, int64_t size, Tensor& holder) {
  if (!t) return nullptr;
  check_cpu(op, name, *t);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == size, "bigkernels::", op, ": ",
                  name, " must be ", size, " int32 values");
  holder = torch::stable::contiguous(*t);
  return (const int32_t*)holder.const_data_ptr();
}

// Everything that both operators share, and what keeps the converted arguments alive.
struct Call {
  Attention a{};
  VectorView alibi, sinks;
  Tensor prefix, bias, mask;

  Call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& alibi_slopes,
       const MaybeTensor& sink_logits, const MaybeTensor& prefix_lengths, const MaybeTensor& seed, int64_t sequences,
       const Options& o)
      : alibi(op, "alibi_slopes", alibi_slopes, q.size(1)), sinks(op, "sinks", sink_logits, q.size(1)) {
    int64_t last = q.dim() - 1;
    check_cpu(op, "q", q);
    check_cpu(op, "k", k);
    check_cpu(op, "v", v);
    a.type = type_of(q);
    STD_TORCH_CHECK(type_of(k) == a.type && type_of(v) == a.type, "bigkernels::", op,
                    ": q, k and v have different dtypes");
    a.heads = q.size(1), a.groups = k.size(1), a.d = q.size(last), a.dv = v.size(last);
    STD_TORCH_CHECK(
        k.size(last) == a.d && v.size(1) == a.groups && a.groups > 0 && a.heads % a.groups == 0 && a.d > 0 && a.dv > 0,
        "bigkernels::", op, ": the heads of q, k and v do not fit");
    a.alibi = alibi.data(), a.sinks = sinks.data();
    a.prefix = integers(op, "prefix_lengths", prefix_lengths, sequences, prefix);
    a.left = window_end(o.left), a.right = window_end(o.right);
    a.scale = (float)o.scale, a.softcap = (float)o.softcap, a.dropout_p = (float)o.dropout_p;
    STD_TORCH_CHECK(usable_softcap(o.softcap) && o.dropout_p >= 0 && o.dropout_p < 1, "bigkernels::", op,
                    ": softcap or dropout_p is out of range");
    if (o.dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "bigkernels::", op, ": dropout needs a seed, one int64 value on the CPU");
      a.seed = *(const uint64_t*)seed->const_data_ptr();
      a.threshold = (uint32_t)std::min(o.dropout_p * 4294967296.0, 4294967295.0);
    }
  }

  Attention::Scores scores(const char* op, const char* name, const Tensor& t, const Tensor& q, const Tensor& k) {
    check_cpu(op, name, t);
    int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)}, strides[4];
    STD_TORCH_CHECK(t.dim() == 4, "bigkernels::", op, ": ", name, " must have four dimensions");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(t.size(i) == full[i] || t.size(i) == 1, "bigkernels::", op, ": ", name,
                      " does not broadcast to the scores");
      strides[i] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    return {t.const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  }

  void dense_scores(const char* op, const Tensor& q, const Tensor& k, const MaybeTensor& b, const MaybeTensor& m) {
    if (b) {
      bias = b->scalar_type() == ScalarType::Double ? torch::stable::to(*b, ScalarType::Float) : *b;
      a.bias_type = type_of(bias);
      a.bias = scores(op, "bias", bias, q, k);
    }
    if (m) {
      mask = *m;
      STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "bigkernels::", op, ": mask must be boolean");
      a.mask = scores(op, "mask", mask, q, k);
    }
  }
};

// Tasks for the rows of all sequences, the longest first; fewer rows where there would be too few tasks.
std::vector<AttentionTask> cut(const Attention& a, int64_t sequences) {
  int64_t group_size = a.heads / a.groups, threads = torch::stable::get_num_threads(), all = 0;
  auto rows_of = [&](int64_t b) { return (a.starts_q ? a.starts_q[b + 1] - a.starts_q[b] : a.queries) * group_size; };
  for (int64_t b = 0; b < sequences; ++b) all += rows_of(b) * a.groups;
  int64_t most = rows_of_task(a);
  if (threads > 1) most = std::max<int64_t>(std::min(most, (all / (threads * 4) + 31) / 32 * 32), 64);
  std::vector<AttentionTask> tasks;
  for (int64_t b = 0; b < sequences; ++b)
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t rows = rows_of(b), r = 0; r < rows; r += most) tasks.push_back({b, g, r, std::min(r + most, rows)});
  // The keys that a row sees tend to grow with its number: those tasks first, so that none is left for the end.
  if (a.right >= 0)
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const AttentionTask& x, const AttentionTask& y) { return x.begin > y.begin; });
  return tasks;
}

void run_forward(const Attention& a, int64_t sequences) {
  std::vector<AttentionTask> tasks = cut(a, sequences);
  int64_t most = 0;
  for (const AttentionTask& t : tasks) most = std::max(most, t.end - t.begin);
  int64_t bytes = table().attention_fwd_workspace(a, most);
  auto kernel = table().attention_fwd;
  parallel_tasks((int64_t)tasks.size(), [&](int64_t i) {
    Scratch mine(bytes);
    kernel(a, tasks[i], mine.data());
  });
}

// The gradients of units, a key head's queries and keys each. Where there are fewer units than keep the threads busy,
// the keys of each are cut as well; how they are cut depends on shapes and the number of threads alone.
void run_backward(const Attention& a, int64_t sequences) {
  const CpuTable& t = table();
  int64_t threads = torch::stable::get_num_threads(), group_size = a.heads / a.groups, units = sequences * a.groups;
  auto rows_of = [&](int64_t b) { return (a.starts_q ? a.starts_q[b + 1] - a.starts_q[b] : a.queries) * group_size; };
  auto keys_of = [&](int64_t b) { return a.starts_k ? a.starts_k[b + 1] - a.starts_k[b] : a.keys; };
  int64_t workspace = t.attention_bwd_workspace(a);
  if (threads == 1 || units % threads == 0 || units >= 4 * threads) {
    int64_t most = 0;
    for (int64_t b = 0; b < sequences; ++b) most = std::max(most, rows_of(b));
    int64_t memory = (t.attention_bwd_memory(a, most, 1) + 63) / 64 * 64;
    std::vector<int64_t> order(units);
    for (int64_t i = 0; i < units; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      int64_t b = x / a.groups, c = y / a.groups;
      return rows_of(b) * keys_of(b) > rows_of(c) * keys_of(c);
    });
    parallel_tasks(units, [&](int64_t i) {
      int64_t b = order[i] / a.groups, g = order[i] % a.groups;
      Scratch mine(memory + workspace);
      t.attention_bwd_rows(a, {b, g, 0, rows_of(b)}, 1, mine.data());
      t.attention_bwd_keys(a, {b, g, 0, keys_of(b)}, 0, 1, mine.data(), mine.data() + memory);
      t.attention_bwd_finish(a, {b, g, 0, rows_of(b)}, 1, mine.data());
    });
    return;
  }
  std::vector<int64_t> place(sequences), bytes(sequences);
  int64_t all = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    place[b] = all;
    bytes[b] = (t.attention_bwd_memory(a, rows_of(b), threads) + 63) / 64 * 64;
    all += bytes[b] * a.groups;
  }
  Scratch shared(all);
  auto memory = [&](int64_t b, int64_t g) { return shared.data() + place[b] + g * bytes[b]; };
  constexpr int64_t kCut = 256;  // rows and keys are cut at its multiples
  std::vector<AttentionTask> rows, keys;
  for (int64_t b = 0; b < sequences; ++b)
    for (int64_t g = 0; g < a.groups; ++g) {
      for (int64_t r = 0; r < rows_of(b); r += kCut) rows.push_back({b, g, r, std::min(r + kCut, rows_of(b))});
      int64_t cuts = (keys_of(b) + kCut - 1) / kCut;
      for (int64_t s = 0; s < threads; ++s) {
        // Under a causal mask early keys have more rows: equal shares of the triangle and not of its base.
        auto edge = [&](int64_t i) {
          double share = (double)i / threads;
          if (a.right == 0 && a.left < 0) share = 1 - std::sqrt(1 - share);
          return std::min<int64_t>(keys_of(b), (int64_t)(share * cuts + 0.5) * kCut);
        };
        keys.push_back({b, g, edge(s), s + 1 == threads ? keys_of(b) : edge(s + 1)});
      }
    }
  parallel_tasks((int64_t)rows.size(),
                 [&](int64_t i) { t.attention_bwd_rows(a, rows[i], threads, memory(rows[i].batch, rows[i].group)); });
  parallel_tasks((int64_t)keys.size(), [&](int64_t i) {
    Scratch mine(workspace);
    t.attention_bwd_keys(a, keys[i], i % threads, threads, memory(keys[i].batch, keys[i].group), mine.data());
  });
  parallel_tasks(units, [&](int64_t i) {
    int64_t b = i / a.groups, g = i % a.groups;
    t.attention_bwd_finish(a, {b, g, 0, rows_of(b)}, threads, memory(b, g));
  });
}

// With few rows the keys' memory is what takes time: the decode kernel reads it once and packs nothing.
constexpr int64_t kFewQueries = 16, kFewRows = 128;

bool few_rows(const Attention& a) {
  return a.queries <= kFewQueries && a.queries * (a.heads / a.groups) <= kFewRows && a.threshold == 0;
}

using Outputs = std::tuple<Tensor, Tensor>;

void check_dense(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "bigkernels::", op,
                  ": q, k and v must be (B, H, S, D)");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(2) == k.size(2), "bigkernels::", op,
                  ": q, k and v do not fit");
}

Outputs forward(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor mask, MaybeTensor alibi_slopes,
                MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed, const Options& o, bool with_lse) {
  const char* op = "attention";
  check_dense(op, q, k, v);
  Tensor out = empty_heads(q, v.size(3));
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v);
  Call call(op, q, k, v, alibi_slopes, sinks, prefix_lengths, seed, q.size(0), o);
  call.dense_scores(op, q, k, bias, mask);
  Attention& a = call.a;
  a.queries = q.size(2), a.keys = k.size(2);
  a.q = dense(q), a.k = dense(k), a.v = dense(v), a.out = dense(out);
  Tensor lse = with_lse ? empty_like_leading(q, 3, ScalarType::Float) : none(q);
  if (with_lse) a.lse = (float*)lse.mutable_data_ptr(), a.lse_batch = lse.stride(0), a.lse_head = lse.stride(1);
  if (few_rows(a)) {
    DecodeAttention few{};
    static_cast<Attention&>(few) = a;
    few.batches = q.size(0);
    decode_attention(few);
  } else {
    run_forward(a, q.size(0));
  }
  return {out, lse};
}

Outputs attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor mask, MaybeTensor alibi_slopes,
                      MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed, int64_t left, int64_t right,
                      double scale, double softcap, double dropout_p) {
  return forward(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed,
                 {left, right, scale, softcap, dropout_p}, true);
}
Tensor attention(Tensor q, Tensor k, Tensor v, MaybeTensor bias, MaybeTensor mask, MaybeTensor alibi_slopes,
                 MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed, int64_t left, int64_t right,
                 double scale, double softcap, double dropout_p) {
  return std::get<0>(forward(q, k, v, bias, mask, alibi_slopes, sinks, prefix_lengths, seed,
                             {left, right, scale, softcap, dropout_p}, false));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Contiguous float32 of the shape of lse, or none.
MaybeTensor lse_gradient(const char* op, const MaybeTensor& grad, const Tensor& lse) {
  if (!grad) return grad;
  check_cpu(op, "grad_lse", *grad);
  bool fits = grad->dim() == lse.dim();
  for (int64_t i = 0; fits && i < lse.dim(); ++i) fits = grad->size(i) == lse.size(i);
  STD_TORCH_CHECK(fits, "bigkernels::", op, ": grad_lse does not have the shape of lse");
  return torch::stable::contiguous(torch::stable::to(*grad, ScalarType::Float));
}

// Sums over batches of the sinks' gradient, in the dtype of the sinks.
class SinkGradient {
 public:
  SinkGradient(Attention& a, const MaybeTensor& sinks, int64_t batches)
      : sinks_(sinks), heads_(a.heads), sums_(sinks ? batches * a.heads : 0) {
    if (sinks) a.grad_sinks = sums_.data();
  }
  Tensor total(const Tensor& like) const {
    if (!sinks_) return none(like);
    Tensor total = empty_1d(heads_);
    float* to = (float*)total.mutable_data_ptr();
    for (int64_t h = 0; h < heads_; ++h) {
      double sum = 0;
      for (size_t i = h; i < sums_.size(); i += heads_) sum += sums_[i];
      to[h] = (float)sum;
    }
    return sinks_->scalar_type() == ScalarType::Float ? total : torch::stable::to(total, sinks_->scalar_type());
  }

 private:
  MaybeTensor sinks_;
  int64_t heads_;
  std::vector<double> sums_;
};

// Queries of a task of the bias's gradient.
constexpr int64_t kBiasQueries = 64;

Tensor bias_gradient(Attention& a, const Tensor& bias) {
  for (int i = 0; i < 4; ++i) a.bias_size[i] = bias.size(i);
  Tensor grad = empty_contiguous_like(bias);
  a.grad_bias = grad.mutable_data_ptr();
  if (grad.numel() == 0) return grad;
  bool shared = a.bias_size[2] == 1;
  int64_t most = shared ? a.queries : std::min(kBiasQueries, a.queries);
  int64_t cuts = shared ? 1 : (a.queries + most - 1) / most, heads = a.bias_size[1];
  int64_t bytes = table().attention_bias_bwd_workspace(a, most);
  parallel_tasks(a.bias_size[0] * heads * cuts, [&](int64_t i) {
    Scratch mine(bytes);
    int64_t at = i / cuts, begin = i % cuts * most;
    table().attention_bias_bwd(a, {at / heads, at % heads, begin, std::min(begin + most, a.queries)}, mine.data());
  });
  return grad;
}

Gradients attention_bwd(Tensor grad, MaybeTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                        MaybeTensor bias, MaybeTensor mask, MaybeTensor alibi_slopes, MaybeTensor sinks,
                        MaybeTensor prefix_lengths, MaybeTensor seed, int64_t left, int64_t right, double scale,
                        double softcap, double dropout_p, bool bias_grad) {
  const char* op = "attention_bwd";
  check_dense(op, q, k, v);
  check_made(op, "out", out, q.scalar_type(), {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_made(op, "lse", lse, ScalarType::Float, {q.size(0), q.size(1), q.size(2)});
  check_like(op, "grad", grad, out);
  Tensor grad_q = empty_heads(q, q.size(3)), grad_k = empty_heads(k, k.size(3)), grad_v = empty_heads(v, v.size(3));
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v), out = last_contiguous(out);
  grad = last_contiguous(grad), lse = torch::stable::contiguous(lse);
  MaybeTensor of_lse = lse_gradient(op, grad_lse, lse);
  Call call(op, q, k, v, alibi_slopes, sinks, prefix_lengths, seed, q.size(0),
            {left, right, scale, softcap, dropout_p});
  call.dense_scores(op, q, k, bias, mask);
  Attention& a = call.a;
  SinkGradient of_sinks(a, sinks, q.size(0));
  a.queries = q.size(2), a.keys = k.size(2), a.batches = q.size(0);
  a.q = dense(q), a.k = dense(k), a.v = dense(v), a.out = dense(out), a.grad = dense(grad);
  a.grad_q = dense(grad_q), a.grad_k = dense(grad_k), a.grad_v = dense(grad_v);
  a.lse = (float*)const_cast<void*>(lse.const_data_ptr()), a.lse_batch = lse.stride(0), a.lse_head = lse.stride(1);
  a.grad_lse = of_lse ? (const float*)of_lse->const_data_ptr() : nullptr;
  run_backward(a, q.size(0));
  Tensor of_bias = bias && bias_grad ? bias_gradient(a, call.bias) : none(q);
  if (bias && bias_grad && of_bias.scalar_type() != bias->scalar_type())
    of_bias = torch::stable::to(of_bias, bias->scalar_type());
  return {grad_q, grad_k, grad_v, of_bias, of_sinks.total(q)};
}

// ---- packed sequences -----------------------------------------------------------------------------------------------

struct PackedCall : Call {
  Tensor starts_q, starts_k;
  int64_t sequences;

  PackedCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
             const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& prefix_lengths,
             const MaybeTensor& seed, const Options& o, int64_t max_q, int64_t max_k)
      : Call(op, q, k, v, alibi_slopes, sinks, prefix_lengths, seed, cu_q.numel() - 1, o), sequences(cu_q.numel() - 1) {
    STD_TORCH_CHECK(sequences >= 0 && v.size(0) == k.size(0), "bigkernels::", op, ": k and v do not fit");
    a.starts_q = starts(op, "cu_seqlens_q", cu_q, q.size(0), max_q, starts_q);
    a.starts_k = starts(op, "cu_seqlens_k", cu_k, k.size(0), max_k, starts_k);
    a.queries = max_q, a.keys = max_k;
    a.q = packed(q), a.k = packed(k), a.v = packed(v);
    a.lse_head = q.size(0);
  }

  const int32_t* starts(const char* op, const char* name, const Tensor& t, int64_t tokens, int64_t most,
                        Tensor& holder) {
    const int32_t* starts = integers(op, name, t, sequences + 1, holder);
    bool right = starts[0] == 0 && starts[sequences] <= tokens;
    for (int64_t i = 0; right && i < sequences; ++i)
      right = starts[i + 1] >= starts[i] && starts[i + 1] - starts[i] <= most;
    STD_TORCH_CHECK(right, "bigkernels::", op, ": ", name, " does not describe the tokens");
    return starts;
  }
};

Outputs packed_forward(Tensor q, Tensor k, Tensor v, const Tensor& cu_q, const Tensor& cu_k,
                       const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& prefix_lengths,
                       const MaybeTensor& seed, int64_t max_q, int64_t max_k, const Options& o, bool with_lse) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3,
                  "bigkernels::varlen_attention: q, k and v must be (T, H, D)");
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v);
  PackedCall call("varlen_attention", q, k, v, cu_q, cu_k, alibi_slopes, sinks, prefix_lengths, seed, o, max_q, max_k);
  Attention& a = call.a;
  int64_t tokens = q.size(0), sizes[3] = {tokens, a.heads, a.dv}, strides[3] = {a.heads * a.dv, a.dv, 1};
  Tensor out = empty_strided(sizes, strides, 3, q.scalar_type(), tokens * a.heads * a.dv * size_of(a.type));
  int64_t lse_sizes[2] = {a.heads, tokens}, lse_strides[2] = {tokens, 1};
  Tensor lse = with_lse ? empty_strided(lse_sizes, lse_strides, 2, ScalarType::Float, a.heads * tokens * 4) : none(q);
  a.out = packed(out);
  if (with_lse) a.lse = (float*)lse.mutable_data_ptr();
  run_forward(a, call.sequences);
  // Tokens after the last sequence.
  int64_t used = a.starts_q[call.sequences], row = a.heads * a.dv * size_of(a.type);
  std::fill_n((char*)out.mutable_data_ptr() + used * row, (tokens - used) * row, 0);
  if (with_lse)
    for (int64_t h = 0; h < a.heads; ++h) std::fill_n(a.lse + h * tokens + used, tokens - used, -INFINITY);
  return {out, lse};
}

Outputs varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                             MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed,
                             int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t left, int64_t right, double scale,
                             double softcap, double dropout_p) {
  return packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, prefix_lengths, seed, max_seqlen_q,
                        max_seqlen_k, {left, right, scale, softcap, dropout_p}, true);
}
Tensor varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                        MaybeTensor alibi_slopes, MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed,
                        int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t left, int64_t right, double scale,
                        double softcap, double dropout_p) {
  return std::get<0>(packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, prefix_lengths, seed,
                                    max_seqlen_q, max_seqlen_k, {left, right, scale, softcap, dropout_p}, false));
}

using PackedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

PackedGradients varlen_attention_bwd(Tensor grad, MaybeTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
                                     Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, MaybeTensor alibi_slopes,
                                     MaybeTensor sinks, MaybeTensor prefix_lengths, MaybeTensor seed,
                                     int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t left, int64_t right,
                                     double scale, double softcap, double dropout_p) {
  const char* op = "varlen_attention_bwd";
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "bigkernels::", op, ": q, k and v must be (T, H, D)");
  check_made(op, "out", out, q.scalar_type(), {q.size(0), q.size(1), v.size(2)});
  check_made(op, "lse", lse, ScalarType::Float, {q.size(1), q.size(0)});
  check_like(op, "grad", grad, out);
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v), out = last_contiguous(out);
  grad = last_contiguous(grad), lse = torch::stable::contiguous(lse);
  MaybeTensor of_lse = lse_gradient(op, grad_lse, lse);
  PackedCall call(op, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, prefix_lengths, seed,
                  {left, right, scale, softcap, dropout_p}, max_seqlen_q, max_seqlen_k);
  Attention& a = call.a;
  SinkGradient of_sinks(a, sinks, call.sequences);
  Tensor grad_q = empty_contiguous_like(q), grad_k = empty_contiguous_like(k), grad_v = empty_contiguous_like(v);
  a.out = packed(out), a.grad = packed(grad);
  a.grad_q = packed(grad_q), a.grad_k = packed(grad_k), a.grad_v = packed(grad_v);
  a.lse = (float*)const_cast<void*>(lse.const_data_ptr());
  a.grad_lse = of_lse ? (const float*)of_lse->const_data_ptr() : nullptr;
  run_backward(a, call.sequences);
  auto clear = [&](Tensor& t, int64_t used) {
    int64_t row = t.stride(0) * size_of(a.type);
    std::fill_n((char*)t.mutable_data_ptr() + used * row, (t.size(0) - used) * row, 0);
  };
  clear(grad_q, a.starts_q[call.sequences]);
  clear(grad_k, a.starts_k[call.sequences]);
  clear(grad_v, a.starts_k[call.sequences]);
  return {grad_q, grad_k, grad_v, of_sinks.total(q)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
  m.impl("varlen_attention_fwd", TORCH_BOX(&varlen_attention_fwd));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
}

}  // namespace bigkernels
