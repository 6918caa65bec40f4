#include <algorithm>
#include <cmath>
#include <numeric>

#include "quantized_weight.h"

namespace bigkernels {
namespace {

constexpr const char* kOp = "linear_cross_entropy";
// Tokens that a task makes the logits of: each packs the whole weight for them.
constexpr int64_t kMostTokens = 256, kLeastTokens = 64;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct Options {
  int64_t ignore_index, reduction;
  double label_smoothing, z_loss, softcap, focal_gamma, logit_scale;
};

// The weight of the head: a matrix, or the codes of one with what goes with them.
struct Head {
  Tensor weight;
  MaybeTensor scale, zero, row_scale, book;
  int64_t group, kind;

  bool coded() const { return kind != 0; }  // 0: numbers, of their own type
};

// A call's arguments as the kernels read them, with what keeps converted copies alive.
class Call {
 public:
  LinearCrossEntropy a{};
  std::vector<float> divisors;  // the class weight of each token that counts

  Call(const Tensor& hidden, const Head& head, const MaybeTensor& bias, const Tensor& target_,
       const MaybeTensor& class_weight, const MaybeTensor& token_weight, const Options& o)
      : target(target_),
        x(matrix(hidden)),
        weight(kOp, "weight", class_weight, head.weight.size(0)),
        of_token(kOp, "token_weight", token_weight, hidden.size(0)),
        added(kOp, "bias", bias, head.weight.size(0)) {
    set_head(head, hidden);
    a.head.in = x.rows, a.head.type = type_of(hidden), a.head.bias = added.data();
    a.vocabulary = a.head.n, a.weight = weight.data();
    STD_TORCH_CHECK(o.label_smoothing >= 0 && o.label_smoothing <= 1 && o.z_loss >= 0 && usable_softcap(o.softcap) &&
                        o.focal_gamma >= 0 && !(o.label_smoothing > 0 && (o.softcap > 0 || head.coded())),
                    "bigkernels::", kOp, ": an option is out of its range");
    a.label_smoothing = (float)o.label_smoothing, a.z_loss = (float)o.z_loss, a.softcap = (float)o.softcap;
    a.focal_gamma = (float)o.focal_gamma, a.logit_scale = (float)o.logit_scale;
    double sum = a.vocabulary;
    if (a.weight) sum = std::accumulate(a.weight, a.weight + a.vocabulary, 0.0);
    a.weight_sum = (float)sum;
    find_tokens(hidden.size(0), o.ignore_index);
  }
  Call(const Call&) = delete;

  int64_t chunks() const { return (a.tokens + a.chunk - 1) / a.chunk; }
  // Of the loss, and so of its gradient.
  float token_weight(int64_t t) const { return of_token.data() ? of_token.data()[rows_[t]] : 1.0f; }

 private:
  Tensor target;
  RowView x;
  VectorView weight, of_token, added;
  MaybeTensor kept_;
  std::optional<RowView> plain_;
  std::optional<QuantizedWeight> codes_;
  std::vector<int64_t> rows_, targets_;

  static const Tensor& matrix(const Tensor& hidden) {
    check_cpu(kOp, "hidden", hidden);
    STD_TORCH_CHECK(hidden.dim() == 2, "bigkernels::", kOp, ": hidden must be (T, H)");
    return hidden;
  }

  void set_head(const Head& head, const Tensor& hidden) {
    check_cpu(kOp, "weight", head.weight);
    STD_TORCH_CHECK(head.weight.dim() == 2, "bigkernels::", kOp, ": weight must be a matrix");
    int64_t k = hidden.size(1);
    if (head.coded()) {
      codes_.emplace(kOp, head.weight, head.scale, head.zero, head.row_scale, head.book, head.group, head.kind, k);
      a.head = codes_->a;
      return;
    }
    STD_TORCH_CHECK(head.weight.size(1) == k &&
                        (type_of(head.weight) == Type::f32 || head.weight.scalar_type() == hidden.scalar_type()),
                    "bigkernels::", kOp, ": weight does not fit hidden");
    plain_.emplace(head.weight);
    set_weight(a.head, plain_->rows, head.weight, head.weight.size(0), k);
  }

  void find_tokens(int64_t tokens, int64_t ignore_index) {
    check_cpu(kOp, "target", target);
    STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == tokens, "bigkernels::", kOp,
                    ": target must hold one class a row of hidden");
    if (target.scalar_type() == ScalarType::Int) target = torch::stable::to(target, ScalarType::Long);
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "bigkernels::", kOp, ": target must be int64 or int32");
    const int64_t* y = (const int64_t*)target.const_data_ptr();
    int64_t stride = tokens > 1 ? target.stride(0) : 1;
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t at = y[t * stride];
      if (at == ignore_index) continue;
      STD_TORCH_CHECK(at >= 0 && at < a.vocabulary, "bigkernels::", kOp, ": target ", at, " is outside the vocabulary");
      rows_.push_back(t), targets_.push_back(at);
      divisors.push_back(a.weight ? a.weight[at] : 1.0f);
    }
    a.row = rows_.data(), a.target = targets_.data(), a.tokens = (int64_t)rows_.size();
    int64_t share = a.tokens / std::max<int64_t>(torch::stable::get_num_threads(), 1);
    a.chunk = (std::clamp(share, kLeastTokens, kMostTokens) + 31) / 32 * 32;
  }
};

float* floats(Tensor& t) { return (float*)t.mutable_data_ptr(); }

Tensor scalar(double value) {
  Tensor t = empty_strided(nullptr, nullptr, 0, ScalarType::Float, 4);
  *floats(t) = (float)value;
  return t;
}

// sum of factor[i] * row at[i], or i, of a matrix.
template <class Factor>
std::vector<float> sum_rows(const Rows& rows, Type type, int64_t count, int64_t k, const int64_t* at,
                            const Factor& factor) {
  int64_t parts = block_count(count, k * size_of(type));
  std::vector<double> sums(parts * k);
  parallel_blocks(parts, count, [&](int64_t block, int64_t begin, int64_t end) {
    std::vector<float> row(k);
    double* sum = sums.data() + block * k;
    for (int64_t i = begin; i < end; ++i) {
      const char* from = (const char*)rows.data + (at ? at[i] : i) * rows.stride * size_of(type);
      if (type == Type::f32)
        std::copy((const float*)from, (const float*)from + k, row.data());
      else
        table().convert(type, false, from, row.data(), k);
      double f = factor(i);
      for (int64_t j = 0; j < k; ++j) sum[j] += f * row[j];
    }
  });
  std::vector<float> total(k);
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0;
    for (int64_t b = 0; b < parts; ++b) sum += sums[b * k + j];
    total[j] = (float)sum;
  }
  return total;
}

Rows weight_rows(const Linear& head, Type type) { return {head.codes, head.code_row / size_of(type)}; }

// How many row blocks of 32 tokens have room in the rows of the gradient of the weight.
int64_t room(const LinearCrossEntropy& a) {
  int64_t bytes = kLossVocabulary * a.head.k * size_of(a.dw_type);
  return bytes / (kLossVocabulary / 32 * table().linear_loss_block(a));
}

// What forward leaves to backward: the size of a chunk, how many tokens count, five numbers for each of them, and which
// chunks have been kept. Its size is that for all tokens, which sizes alone tell.
struct State {
  float* data;

  static constexpr int64_t kHead = 2, kExact = int64_t{1} << 24;  // what float32 counts
  static int64_t size(int64_t tokens) { return kHead + 6 * tokens; }
  float* kept(const LinearCrossEntropy& a) const { return data + kHead + 5 * a.tokens; }

  void hand_to(LinearCrossEntropy& a) const {
    float* of_token = data + kHead;
    a.shift = of_token, a.coefficient = of_token + a.tokens, a.pull = of_token + 2 * a.tokens;
    a.beta = of_token + 3 * a.tokens, a.unit = of_token + 4 * a.tokens;
  }
  void describe(const LinearCrossEntropy& a) const { data[0] = (float)a.chunk, data[1] = (float)(a.tokens % kExact); }
  // The threads, and so the size of a chunk, may be others than in forward; the tokens may not.
  void read_chunks(LinearCrossEntropy& a) const {
    float chunk = data[0];
    STD_TORCH_CHECK(data[1] == (float)(a.tokens % kExact), "bigkernels::", kOp,
                    ": other tokens count than in forward: target was written in between");
    STD_TORCH_CHECK(chunk >= 32 && chunk <= kMostTokens && (int64_t)chunk % 32 == 0, "bigkernels::", kOp,
                    ": state is not what forward returned");
    a.chunk = (int64_t)chunk;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor hidden, Tensor weight, MaybeTensor scale, MaybeTensor zero, MaybeTensor row_scale, MaybeTensor book,
    int64_t group, int64_t kind, MaybeTensor bias, Tensor target, MaybeTensor class_weight, MaybeTensor token_weight,
    int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap, double focal_gamma,
    double logit_scale, bool backward, bool of_hidden, bool of_weight, bool report) {
  Options o{ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma, logit_scale};
  Call call(hidden, {weight, scale, zero, row_scale, book, group, kind}, bias, target, class_weight, token_weight, o);
  LinearCrossEntropy& a = call.a;
  std::vector<float> losses(a.tokens), lses(a.tokens), smoothed;
  std::vector<uint8_t> kept(call.chunks());
  std::vector<int64_t> predicted(report ? a.tokens : 0);
  a.loss = losses.data(), a.lse = lses.data(), a.kept = kept.data();
  if (report) a.predicted = predicted.data();
  Tensor dx = none(hidden), dw = none(weight), state = none(hidden);
  if (backward) {
    state = empty_1d(State::size(hidden.size(0)));
    State{floats(state)}.hand_to(a);
  }
  if (of_hidden) {
    dx = empty_contiguous_like(hidden);
    if (a.tokens < hidden.size(0)) torch::stable::zero_(dx);
    a.dx = dx.mutable_data_ptr();
    if (label_smoothing > 0) {
      Type type = type_of(weight);
      smoothed = sum_rows(weight_rows(a.head, type), type, a.vocabulary, a.head.k, nullptr,
                          [&](int64_t v) { return a.weight ? a.weight[v] : 1.0f; });
      a.smoothed = smoothed.data();
    }
  }
  if (of_weight) {
    dw = empty_contiguous_like(weight);
    a.dw = dw.mutable_data_ptr(), a.dw_type = type_of(weight), a.saved = room(a);
  }
  int64_t size = table().linear_loss_tokens_size(a);
  parallel_tasks(call.chunks(), [&](int64_t chunk) {
    Scratch memory(size);
    table().linear_loss_tokens(a, chunk, memory.data());
  });
  if (backward) {
    State{floats(state)}.describe(a);
    std::copy(kept.begin(), kept.end(), State{floats(state)}.kept(a));
  }
  for (int64_t t = 0; t < a.tokens; ++t) losses[t] *= call.token_weight(t);
  double kept_weight = std::accumulate(call.divisors.begin(), call.divisors.end(), 0.0);
  Tensor loss;
  if (reduction == kNone) {
    loss = empty_1d(hidden.size(0));
    torch::stable::zero_(loss);
    for (int64_t t = 0; t < a.tokens; ++t) floats(loss)[a.row[t]] = losses[t];
  } else {
    double total = std::accumulate(losses.begin(), losses.end(), 0.0);
    loss = scalar(reduction == kMean ? total / kept_weight : total);
  }
  // Of all tokens, those that do not count as well.
  int64_t reported = report ? hidden.size(0) : 0;
  Tensor of_token = empty_1d(reported, ScalarType::Long), lse = empty_1d(reported);
  int64_t* classes = (int64_t*)of_token.mutable_data_ptr();
  std::fill(classes, classes + reported, -1);
  std::fill(floats(lse), floats(lse) + reported, 0.0f);
  for (int64_t t = 0; t < a.tokens && report; ++t) classes[a.row[t]] = predicted[t], floats(lse)[a.row[t]] = lses[t];
  return {loss, scalar(kept_weight), dx, dw, state, of_token, lse};
}

// Scales dx, and fills dw and dbias; both hold what forward left in them.
Tensor backward(Tensor grad, Tensor hidden, Tensor weight, MaybeTensor scale, MaybeTensor zero, MaybeTensor row_scale,
                MaybeTensor book, int64_t group, int64_t kind, MaybeTensor bias, Tensor target,
                MaybeTensor class_weight, MaybeTensor token_weight, Tensor divisor, Tensor state, Tensor dx, Tensor dw,
                int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap,
                double focal_gamma, double logit_scale, bool of_hidden, bool of_weight, bool of_bias) {
  Options o{ignore_index, reduction, label_smoothing, z_loss, softcap, focal_gamma, logit_scale};
  Call call(hidden, {weight, scale, zero, row_scale, book, group, kind}, bias, target, class_weight, token_weight, o);
  LinearCrossEntropy& a = call.a;
  int64_t k = a.head.k;
  bool one = reduction != kNone;
  check_cpu(kOp, "grad", grad);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == (one ? 0 : 1) &&
                      grad.numel() == (one ? 1 : hidden.size(0)),
                  "bigkernels::", kOp, ": grad does not fit");
  check_made(kOp, "divisor", divisor, ScalarType::Float, {});
  check_made(kOp, "state", state, ScalarType::Float, {State::size(hidden.size(0))});
  if (of_hidden) check_like(kOp, "dx", dx, hidden);
  if (of_weight) check_like(kOp, "dw", dw, weight);
  STD_TORCH_CHECK(state.is_contiguous() && (!of_hidden || dx.is_contiguous()) && (!of_weight || dw.is_contiguous()) &&
                      !(of_weight && kind != 0),
                  "bigkernels::", kOp, ": state, dx and dw must be as forward returned them");
  State before{floats(state)};
  before.hand_to(a);
  before.read_chunks(a);
  std::vector<uint8_t> kept(call.chunks());
  for (int64_t p = 0; p < call.chunks(); ++p) kept[p] = before.kept(a)[p] != 0;
  a.kept = kept.data();
  const float* upstream = (const float*)grad.const_data_ptr();
  int64_t stride = one ? 0 : grad.stride(0);
  float divide = reduction == kMean ? *(const float*)divisor.const_data_ptr() : 1.0f;
  std::vector<float> factor(a.tokens);
  for (int64_t t = 0; t < a.tokens; ++t) factor[t] = upstream[a.row[t] * stride] / divide * call.token_weight(t);
  a.factor = factor.data();
  if (of_hidden && a.tokens) {
    a.dx = dx.mutable_data_ptr();
    parallel_rows(a.tokens, k * size_of(a.head.type),
                  [&](int64_t begin, int64_t end) { table().linear_loss_scale(a, begin, end); });
  }
  Tensor dbias = none(state);
  if (of_bias) {
    dbias = empty_1d(a.vocabulary);
    torch::stable::zero_(dbias);
    a.dbias = floats(dbias);
  }
  if (of_weight) a.dw = dw.mutable_data_ptr(), a.dw_type = type_of(weight), a.saved = room(a);
  if (!of_weight && !of_bias) return dbias;
  if (a.tokens == 0 || k == 0) {
    if (of_weight) torch::stable::zero_(dw);
    if (a.tokens == 0) return dbias;
  }
  // From here on the factors are those of the products, not of the logits.
  for (float& f : factor) f *= a.logit_scale;
  std::vector<float> beta_x;
  if (label_smoothing > 0) {
    double sum = 0;
    for (int64_t t = 0; t < a.tokens; ++t) sum += (double)factor[t] * a.beta[t];
    a.beta_sum = (float)sum;
    beta_x = sum_rows(a.head.in, a.head.type, a.tokens, k, a.row, [&](int64_t t) { return factor[t] * a.beta[t]; });
    a.beta_x = beta_x.data();
  }
  float top = 0;
  for (int64_t t = 0; t < a.tokens; ++t) top = std::max(top, std::fabs(factor[t] * a.coefficient[t]));
  a.top = top > 0 && std::isfinite(top) ? top : 1.0f;
  int64_t blocks = (a.vocabulary + kLossVocabulary - 1) / kLossVocabulary;
  std::vector<int64_t> sorted(a.tokens), first(blocks + 1);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t s, int64_t t) { return a.target[s] < a.target[t]; });
  for (int64_t t = 0; t < a.tokens; ++t) ++first[a.target[t] / kLossVocabulary + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  a.sorted = sorted.data(), a.first = first.data();
  int64_t row_blocks = (a.tokens + 31) / 32, row_block_bytes = table().linear_loss_row_block_bytes(a);
  Scratch transposed(row_blocks * row_block_bytes);
  parallel_rows(row_blocks, row_block_bytes,
                [&](int64_t begin, int64_t end) { table().linear_loss_transpose(a, begin, end, transposed.data()); });
  a.transposed = transposed.data();
  int64_t size = table().linear_loss_weight_size(a);
  parallel_tasks(blocks, [&](int64_t block) {
    Scratch memory(size);
    table().linear_loss_weight(a, block, memory.data());
  });
  return dbias;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&forward));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
