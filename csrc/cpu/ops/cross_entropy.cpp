#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// The arguments as the kernel reads them, with what keeps converted copies alive.
struct Call {
  RowView rows;
  Tensor target;
  VectorView weight, token_weight;
  CrossEntropy a = {};

  Call(const Tensor& logits, const Tensor& target_, const MaybeTensor& weight_, const MaybeTensor& token_weight_,
       int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double focal_gamma)
      : rows(checked(logits)),
        target(target_),
        weight("cross_entropy", "weight", weight_, logits.size(1)),
        token_weight("cross_entropy", "token_weight", token_weight_, logits.size(0)) {
    check_cpu("cross_entropy", "target", target);
    STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == logits.size(0),
                    "bigkernels::cross_entropy: target must hold one class a row of logits");
    if (target.scalar_type() == ScalarType::Int) target = torch::stable::to(target, ScalarType::Long);
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long,
                    "bigkernels::cross_entropy: target must be int64 or int32");
    if (!target.is_contiguous()) target = torch::stable::contiguous(target);
    STD_TORCH_CHECK(
        label_smoothing >= 0 && label_smoothing <= 1 && z_loss >= 0 && usable_softcap(softcap) && focal_gamma >= 0,
        "bigkernels::cross_entropy: an option is out of its range");
    a.logits = rows.rows;
    a.target = (const int64_t*)target.const_data_ptr();
    a.weight = weight.data(), a.token_weight = token_weight.data();
    a.vocabulary = logits.size(1), a.ignore_index = ignore_index;
    a.label_smoothing = (float)label_smoothing, a.z_loss = (float)z_loss;
    a.softcap = (float)softcap, a.focal_gamma = (float)focal_gamma;
    a.type = type_of(logits);
    for (int64_t r = 0; r < rows_count(); ++r)
      STD_TORCH_CHECK(a.target[r] == ignore_index || (a.target[r] >= 0 && a.target[r] < a.vocabulary),
                      "bigkernels::cross_entropy: target ", a.target[r], " is outside the vocabulary");
    a.weight_sum = (float)a.vocabulary;
    if (a.weight && label_smoothing > 0) {
      double sum = 0;
      for (int64_t c = 0; c < a.vocabulary; ++c) sum += a.weight[c];
      a.weight_sum = (float)sum;
    }
  }

  int64_t rows_count() const { return target.size(0); }

 private:
  static const Tensor& checked(const Tensor& logits) {
    check_cpu("cross_entropy", "logits", logits);
    STD_TORCH_CHECK(logits.dim() == 2, "bigkernels::cross_entropy: logits must be (T, V)");
    return logits;
  }
};

double sum(const float* values, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += values[i];
  return s;
}

Tensor scalar(float value) {
  Tensor t = empty_strided(nullptr, nullptr, 0, ScalarType::Float, 4);
  *(float*)t.mutable_data_ptr() = value;
  return t;
}

// Per-token values that no caller sees; a few tokens' worth stays on the stack.
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(n <= kInline ? inline_ : new float[n]) {}
  ~Scratch() {
    if (data_ != inline_) delete[] data_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  static constexpr int64_t kInline = 64;
  float inline_[kInline];
  float* data_;
};

// The loss; lse and divisor: null where no backward follows.
Tensor losses(Call& call, int64_t reduction, Tensor* lse, Tensor* divisor) {
  int64_t rows = call.rows_count();
  CrossEntropy& a = call.a;
  Scratch loss_a_token(reduction == kNone ? 0 : rows), lse_a_token(lse ? 0 : rows), divisors(rows);
  Tensor loss;
  if (reduction == kNone) loss = empty_1d(rows);
  if (lse) *lse = empty_1d(rows);
  a.loss = reduction == kNone ? (float*)loss.mutable_data_ptr() : loss_a_token.data();
  a.lse = lse ? (float*)lse->mutable_data_ptr() : lse_a_token.data();
  a.divisor = divisors.data();
  auto kernel = table().cross_entropy_fwd;
  parallel_rows(rows, a.vocabulary * size_of(a.type), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  double kept = sum(a.divisor, rows);
  if (divisor) *divisor = scalar((float)kept);
  if (reduction == kNone) return loss;
  double total = sum(a.loss, rows);
  return scalar((float)(reduction == kMean ? total / kept : total));
}

Tensor infer(Tensor logits, Tensor target, MaybeTensor weight, MaybeTensor token_weight, int64_t ignore_index,
             int64_t reduction, double label_smoothing, double z_loss, double softcap, double focal_gamma) {
  Call call(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma);
  return losses(call, reduction, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logits, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
                                           int64_t ignore_index, int64_t reduction, double label_smoothing,
                                           double z_loss, double softcap, double focal_gamma) {
  Call call(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma);
  Tensor lse, divisor;
  Tensor loss = losses(call, reduction, &lse, &divisor);
  return {loss, lse, divisor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> predict(Tensor logits, Tensor target, MaybeTensor weight,
                                                   MaybeTensor token_weight, int64_t ignore_index, int64_t reduction,
                                                   double label_smoothing, double z_loss, double softcap,
                                                   double focal_gamma) {
  Call call(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma);
  Tensor lse, divisor, predicted = empty_1d(call.rows_count(), ScalarType::Long);
  call.a.predicted = (int64_t*)predicted.mutable_data_ptr();
  Tensor loss = losses(call, reduction, &lse, &divisor);
  return {loss, lse, divisor, predicted};
}

Tensor backward(Tensor grad, Tensor logits, Tensor target, MaybeTensor weight, MaybeTensor token_weight, Tensor lse,
                Tensor divisor, int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss,
                double softcap, double focal_gamma) {
  Call call(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap, focal_gamma);
  int64_t rows = call.rows_count();
  CrossEntropy& a = call.a;
  bool one = reduction != kNone;
  constexpr const char* op = "cross_entropy_bwd";
  check_made(op, "lse", lse, ScalarType::Float, {rows});
  check_made(op, "divisor", divisor, ScalarType::Float, {});
  check_cpu(op, "grad", grad);
  STD_TORCH_CHECK(lse.is_contiguous() && grad.scalar_type() == ScalarType::Float && grad.dim() == (one ? 0 : 1) &&
                      grad.numel() == (one ? 1 : rows),
                  "bigkernels::cross_entropy_bwd: grad or lse does not fit");
  Tensor out = empty_contiguous_like(logits);
  a.grad = (const float*)grad.const_data_ptr(), a.grad_stride = one ? 0 : grad.stride(0);
  a.grad_scale = reduction == kMean ? 1.0f / *(const float*)divisor.const_data_ptr() : 1.0f;
  a.lse = (float*)lse.mutable_data_ptr();
  a.out = out.mutable_data_ptr();
  int64_t row_bytes = a.vocabulary * size_of(a.type);
  a.stream = worth_streaming(out, row_bytes, rows * row_bytes);
  auto kernel = table().cross_entropy_bwd;
  parallel_rows(rows, 2 * row_bytes, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&infer));
  m.impl("cross_entropy_fwd", TORCH_BOX(&forward));
  m.impl("cross_entropy_predict", TORCH_BOX(&predict));
  m.impl("cross_entropy_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
