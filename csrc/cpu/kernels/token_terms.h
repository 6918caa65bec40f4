// The cross entropy of one token from what its logits add up to: the loss, and the factors of its gradient.
#pragma once
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE vf capped(vf x, float cap) { return vtanh(x * (1.0f / cap)) * cap; }
BK_INLINE float capped(float x, float cap) { return capped(splat(x), cap)[0]; }

// The gradient of logit j is alpha p[j] - beta w[j], and at the target `pulled` - beta w[target].
struct TokenTerms {
  float loss, alpha, beta, pulled;
};

// nll = lse - z[target]; missing = 1 - p[target], with its precision where p[target] is near 1; w: the class weight of
// the target; weighted: sum(w z) where there is label smoothing.
template <class Options>
BK_INLINE TokenTerms token_terms(const Options& a, float nll, float missing, float lse, float w, float weighted) {
  float smoothing = a.label_smoothing, share = smoothing / (float)a.vocabulary;
  float kappa = (1.0f - smoothing) * w, ce = kappa * nll;
  if (smoothing > 0) ce += share * (a.weight_sum * lse - weighted);
  TokenTerms t{ce, kappa + share * a.weight_sum, share, 0};
  if (a.focal_gamma > 0) {
    float focal = __builtin_powf(missing, a.focal_gamma);
    float pull = missing > 0 ? ce * a.focal_gamma * focal / missing * (1.0f - missing) : 0.0f;
    kappa = kappa * focal + pull;
    t.loss *= focal, t.alpha = t.alpha * focal + pull, t.beta *= focal;
  }
  if (a.z_loss > 0) t.loss += a.z_loss * lse * lse, t.alpha += 2.0f * a.z_loss * lse;
  // alpha p - kappa: by 1 - p where p is near 1, so that a confident token keeps its digits.
  t.pulled = missing < 0.5f ? (t.alpha - kappa) - t.alpha * missing : t.alpha * __builtin_expf(-nll) - kappa;
  return t;
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
