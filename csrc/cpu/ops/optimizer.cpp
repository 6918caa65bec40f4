// Optimizer steps over a flat list of chunks of all parameters, in one parallel region. The records come from
// bigkernels/optim/_plan.py, which has looked at what they point to; all other numbers in them are checked here.
#include <bigkernels/stable.h>
#include <bigkernels/update.h>

#include <algorithm>

namespace bigkernels {
namespace {

template <class T>
const T* records(const char* name, const Tensor& t, int64_t* count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "bigkernels::optimizer_step: ", name, " is no list of records");
  int64_t bytes = t.numel() * t.element_size();
  STD_TORCH_CHECK(bytes % sizeof(T) == 0, "bigkernels::optimizer_step: ", name, " has half a record");
  STD_TORCH_CHECK((uintptr_t)t.const_data_ptr() % alignof(T) == 0, "bigkernels::optimizer_step: ", name,
                  " does not lie on whole words");
  *count = bytes / (int64_t)sizeof(T);
  return (const T*)t.const_data_ptr();
}

bool is_type(int64_t type, int64_t last) { return type >= 0 && type <= last; }
constexpr int64_t kLastType = (int64_t)Type::f16, kLastState = (int64_t)StateType::int8;

struct Lists {
  const OptimizerTensor* tensors;
  const OptimizerGrad* grads;
  const OptimizerChunk* chunks;
  int64_t tensor_count, grad_count, chunk_count;

  Lists(const Tensor& t, const Tensor& g, const Tensor& c) {
    tensors = records<OptimizerTensor>("tensors", t, &tensor_count);
    grads = records<OptimizerGrad>("grads", g, &grad_count);
    chunks = records<OptimizerChunk>("chunks", c, &chunk_count);
    STD_TORCH_CHECK(tensor_count == grad_count, "bigkernels::optimizer_step: not one gradient a tensor");
    for (int64_t i = 0; i < tensor_count; ++i)
      STD_TORCH_CHECK(tensors[i].n >= 0 && (!grads[i].data || is_type(grads[i].type, kLastType)),
                      "bigkernels::optimizer_step: no such gradient");
    for (int64_t i = 0; i < chunk_count; ++i) {
      const OptimizerChunk& chunk = chunks[i];
      STD_TORCH_CHECK(chunk.tensor >= 0 && chunk.tensor < tensor_count && chunk.begin >= 0 &&
                          chunk.begin % kStateBlock == 0 && chunk.begin <= chunk.end &&
                          chunk.end <= tensors[chunk.tensor].n,
                      "bigkernels::optimizer_step: a chunk is not in its tensor");
    }
  }

  // What a step reads and writes beside the gradients.
  void check_tensors(Algorithm algorithm, const OptimizerGroup* groups, int64_t group_count) const {
    for (int64_t i = 0; i < group_count; ++i)
      STD_TORCH_CHECK(is_type(groups[i].rounding, (int64_t)Rounding::kahan),
                      "bigkernels::optimizer_step: no such rounding");
    int needed = 0, known = 0;
    by_algorithm(algorithm, [&](auto rule) { needed = rule.kNeeded, known = rule.kKnown; });
    for (int64_t i = 0; i < tensor_count; ++i) {
      const OptimizerTensor& t = tensors[i];
      if (!grads[i].data) continue;
      STD_TORCH_CHECK(t.group >= 0 && t.group < group_count, "bigkernels::optimizer_step: no such group");
      STD_TORCH_CHECK(t.step && (t.n == 0 || t.param) && is_type(t.param_type, kLastType) &&
                          is_type(t.state_type, kLastState) && (!t.remainder || t.param_type == (int64_t)Type::bf16),
                      "bigkernels::optimizer_step: no such parameter");
      STD_TORCH_CHECK(*t.step >= 0.0 && *t.step < 0x1p53 && *t.step == (double)(int64_t)*t.step,
                      "bigkernels::optimizer_step: a step is ", *t.step, "; it has to be a whole number from 0 on");
      for (int k = 0; k < kStates && t.n; ++k) {
        const bool there = t.state[k] != nullptr;
        STD_TORCH_CHECK(there || !(needed >> k & 1), "bigkernels::optimizer_step: a state is missing");
        STD_TORCH_CHECK(!there || (known >> k & 1), "bigkernels::optimizer_step: no such state");
        STD_TORCH_CHECK(!there || t.scale[k] || t.state_type != (int64_t)StateType::int8,
                        "bigkernels::optimizer_step: a state of 8 bits lacks its scales");
      }
    }
  }

  // f(chunk number) for the chunks of tensors that have a gradient, on the first thread that is free. Neighbouring
  // chunks go together: small ones, and as many as leave each thread some 16 tasks, for the memory's sake, which starts
  // anew at each.
  template <class F>
  void for_chunks(const F& f) const {
    int64_t all = 0, elements = 0;
    for (int64_t i = 0; i < chunk_count; ++i)
      if (grads[chunks[i].tensor].data) all += chunks[i].end - chunks[i].begin;
    const int64_t least = std::min(kChunk, grain_bytes());
    const int64_t most = std::clamp(all / (16 * (int64_t)torch::stable::get_num_threads()), least, 64 * kChunk);
    std::vector<int64_t> tasks{0};
    for (int64_t i = 0; i < chunk_count; ++i) {
      if (grads[chunks[i].tensor].data) elements += chunks[i].end - chunks[i].begin;
      if (elements >= most) tasks.push_back(i + 1), elements = 0;
    }
    if (tasks.back() != chunk_count) tasks.push_back(chunk_count);
    parallel_tasks((int64_t)tasks.size() - 1, [&](int64_t task) {
      for (int64_t i = tasks[task]; i < tasks[task + 1]; ++i)
        if (grads[chunks[i].tensor].data) f(i);
    });
  }
};

double value_of(const Tensor& t) {
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1 && (is_double || t.scalar_type() == ScalarType::Float),
                  "bigkernels::optimizer_step: not one float32 or float64 on the CPU");
  return is_double ? *(const double*)t.const_data_ptr() : *(const float*)t.const_data_ptr();
}

// What gradients are multiplied with: the loss scale and the divisor taken out, the norm of the result clipped.
double grad_factor(const MaybeTensor& scale, const MaybeTensor& divisor, const MaybeTensor& norm, double max_norm) {
  double factor = 1.0;
  if (scale) factor /= value_of(*scale);
  if (divisor) factor /= value_of(*divisor);
  if (norm) {
    // In float32, as clip_grad_norm_ has it.
    float clip = (float)max_norm / ((float)value_of(*norm) + 1e-6f);
    factor *= clip > 1.0f ? 1.0f : clip;
  }
  return factor;
}

std::vector<OptimizerScalars> scalars_for(Algorithm algorithm, const Lists& lists, const Tensor& groups, double factor,
                                          bool advance) {
  int64_t group_count;
  const OptimizerGroup* group = records<OptimizerGroup>("groups", groups, &group_count);
  lists.check_tensors(algorithm, group, group_count);
  std::vector<OptimizerScalars> scalars(lists.tensor_count);
  int64_t last = -1;  // its scalars are those of the next tensor of its group and step, too
  double last_step = 0.0;
  for (int64_t i = 0; i < lists.tensor_count; ++i) {
    if (!lists.grads[i].data) continue;
    const OptimizerTensor& t = lists.tensors[i];
    if (advance) *t.step += 1.0;
    if (last >= 0 && lists.tensors[last].group == t.group && last_step == *t.step)
      scalars[i] = scalars[last];
    else
      scalars[i] = scalars_of(algorithm, group[t.group], *t.step, factor);
    last = i, last_step = *t.step;
  }
  return scalars;
}

void step(int64_t algorithm, Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, MaybeTensor grad_scale,
          MaybeTensor found_inf, MaybeTensor divisor, MaybeTensor norm, double max_norm, MaybeTensor trust) {
  STD_TORCH_CHECK(algorithm >= 0 && algorithm <= (int64_t)kLastAlgorithm, "bigkernels::optimizer_step: no algorithm ",
                  algorithm);
  if (found_inf && value_of(*found_inf) != 0.0) return;
  Lists lists(tensors, grads, chunks);
  Algorithm a = (Algorithm)algorithm;
  // With trust ratios this is the second pass: the first has counted the step.
  auto scalars = scalars_for(a, lists, groups, grad_factor(grad_scale, divisor, norm, max_norm), !trust);
  if (trust) {
    STD_TORCH_CHECK(trust->is_cpu() && trust->scalar_type() == ScalarType::Float && trust->is_contiguous() &&
                        trust->numel() == lists.tensor_count,
                    "bigkernels::optimizer_step: trust must be float32, one a tensor");
    for (int64_t i = 0; i < lists.tensor_count; ++i) scalars[i].trust = ((const float*)trust->const_data_ptr())[i];
  }
  auto kernel = table().optimizer_step;
  lists.for_chunks([&](int64_t i) {
    int64_t t = lists.chunks[i].tensor;
    kernel(a, lists.tensors[t], lists.grads[t], scalars[t], lists.chunks[i]);
  });
}

// (tensors, 2) float64: added up over the chunks of each tensor in their order.
void measure(Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, MaybeTensor grad_scale, MaybeTensor found_inf,
             MaybeTensor divisor, MaybeTensor norm, double max_norm, Tensor sums) {
  if (found_inf && value_of(*found_inf) != 0.0) return;
  Lists lists(tensors, grads, chunks);
  STD_TORCH_CHECK(sums.is_cpu() && sums.scalar_type() == ScalarType::Double && sums.is_contiguous() &&
                      sums.numel() == 2 * lists.tensor_count,
                  "bigkernels::optimizer_measure: sums must be float64, two a tensor");
  auto scalars = scalars_for(Algorithm::lamb, lists, groups, grad_factor(grad_scale, divisor, norm, max_norm), true);
  std::vector<double> parts(2 * lists.chunk_count);
  auto kernel = table().optimizer_measure;
  lists.for_chunks([&](int64_t i) {
    int64_t t = lists.chunks[i].tensor;
    kernel(lists.tensors[t], lists.grads[t], scalars[t], lists.chunks[i], &parts[2 * i]);
  });
  double* out = (double*)sums.mutable_data_ptr();
  std::fill(out, out + 2 * lists.tensor_count, 0.0);
  for (int64_t i = 0; i < lists.chunk_count; ++i)
    for (int k = 0; k < 2; ++k) out[2 * lists.chunks[i].tensor + k] += parts[2 * i + k];
}

// (tensors,) float64: of each gradient the sum of squares, or the largest magnitude.
void norms(Tensor tensors, Tensor grads, Tensor chunks, Tensor out, bool infinity) {
  Lists lists(tensors, grads, chunks);
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Double && out.is_contiguous() &&
                      out.numel() == lists.tensor_count,
                  "bigkernels::optimizer_norm: out must be float64, one a tensor");
  std::vector<double> parts(lists.chunk_count);
  auto kernel = table().optimizer_norm;
  lists.for_chunks(
      [&](int64_t i) { parts[i] = kernel(lists.grads[lists.chunks[i].tensor], lists.chunks[i], infinity); });
  double* values = (double*)out.mutable_data_ptr();
  std::fill(values, values + lists.tensor_count, 0.0);
  for (int64_t i = 0; i < lists.chunk_count; ++i) {
    double& total = values[lists.chunks[i].tensor];
    if (!infinity)
      total += parts[i];
    else if (parts[i] > total || parts[i] != parts[i])  // NaN wins
      total = parts[i];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("optimizer_step", TORCH_BOX(&step));
  m.impl("optimizer_measure", TORCH_BOX(&measure));
  m.impl("optimizer_norm", TORCH_BOX(&norms));
}

}  // namespace bigkernels
