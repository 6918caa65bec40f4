// The blocks of the CUDA optimizer kernels in a host build: what the kernels of csrc/cuda/kernels/optimizer.cu do with
// them, in loops over thread blocks and warps. `parts` thread blocks a chunk, of `warps` warps each.
#include <vector>

#include "optimizer_block.cuh"

namespace bigkernels {
namespace cuda {
namespace {

template <Algorithm A, bool kMeasure>
void step(const OptimizerLists& lists, const OptimizerFactors& factors, const std::vector<OptimizerScalars>& scalars,
          int parts, int warps, double* sums) {
  if (found_inf(factors)) return;
  for (int64_t c = 0; c < lists.chunk_count; ++c)
    for (int part = 0; part < parts; ++part) {
      const OptimizerChunk chunk = lists.chunks[c];
      const OptimizerGrad grad = lists.grads[chunk.tensor];
      double all[2] = {};
      for (int warp = 0; warp < warps && grad.data; ++warp) {
        OptimizerScalars s = scalars[chunk.tensor];
        s.flags = true_flags<A>(s.flags, lists.tensors[chunk.tensor]);
        PerLane<double> mine[2] = {};
        for_blocks(chunk, part * warps + warp, parts * warps,
                   [&](const Block& b) { step_block<A, kMeasure>(lists.tensors[chunk.tensor], grad, s, b, mine); });
        for (int k = 0; k < 2; ++k) all[k] += over_lanes(mine[k], [](double a, double b) { return a + b; });
      }
      if (kMeasure)
        for (int k = 0; k < 2; ++k) sums[2 * (c * parts + part) + k] = all[k];
    }
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels

using namespace bigkernels;
using namespace bigkernels::cuda;

extern "C" void host_step(int algorithm, const OptimizerLists* lists, const OptimizerFactors* factors,
                          const float* trust, int parts, int warps) {
  std::vector<OptimizerScalars> scalars(lists->tensor_count);
  for (int64_t i = 0; i < lists->tensor_count; ++i)
    prepare((Algorithm)algorithm, *lists, *factors, trust, !trust, i, scalars.data());
  by_algorithm((Algorithm)algorithm, [&](auto rule) {
    step<decltype(rule)::kAlgorithm, false>(*lists, *factors, scalars, parts, warps, nullptr);
  });
}

extern "C" void host_measure(const OptimizerLists* lists, const OptimizerFactors* factors, double* sums, int parts,
                             int warps) {
  std::vector<OptimizerScalars> scalars(lists->tensor_count);
  for (int64_t i = 0; i < lists->tensor_count; ++i)
    prepare(Algorithm::lamb, *lists, *factors, nullptr, true, i, scalars.data());
  std::vector<double> values(2 * parts * lists->chunk_count);
  step<Algorithm::lamb, true>(*lists, *factors, scalars, parts, warps, values.data());
  if (found_inf(*factors)) return;
  for (int64_t i = 0; i < lists->tensor_count; ++i) total(*lists, i, values.data(), parts, 2, false, sums);
}

extern "C" void host_norm(const OptimizerLists* lists, double* out, bool infinity, int parts, int warps) {
  const auto join = [infinity](double a, double b) { return infinity ? larger(a, b) : a + b; };
  std::vector<double> values(parts * lists->chunk_count);
  for (int64_t c = 0; c < lists->chunk_count; ++c)
    for (int part = 0; part < parts; ++part)
      for (int warp = 0; warp < warps; ++warp) {
        const OptimizerGrad grad = lists->grads[lists->chunks[c].tensor];
        PerLane<double> mine = {};
        if (grad.data)
          for_blocks(lists->chunks[c], part * warps + warp, parts * warps,
                     [&](const Block& b) { norm_block(grad, b, infinity, mine); });
        double& value = values[c * parts + part];
        value = join(value, over_lanes(mine, join));
      }
  for (int64_t i = 0; i < lists->tensor_count; ++i) total(*lists, i, values.data(), parts, 1, infinity, out);
}

// One value through a format and back, for comparing whole ranges of bits with bigkernels/optim/_formats.py.
extern "C" void host_halves(const float* x, const uint32_t* random, int64_t n, bool f16, uint16_t* nearest,
                            uint16_t* rounded, float* widened) {
  for (int64_t i = 0; i < n; ++i) {
    nearest[i] = (uint16_t)(f16 ? nearest_f16(x[i]) : nearest_bf16(x[i]));
    rounded[i] = (uint16_t)(f16 ? stochastic_f16(x[i], random[i]) : stochastic_bf16(x[i], random[i]));
    widened[i] = widen(nearest[i], f16 ? Type::f16 : Type::bf16);
  }
}
extern "C" void host_codes(const float* x, float scale, int64_t n, bool sign, uint8_t* codes, float* decoded) {
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = (uint8_t)encode8(x[i], sign, inverse8(scale));
    decoded[i] = decode8(codes[i], sign, scale);
  }
}
extern "C" void host_split(const float* x, int64_t n, uint16_t* high, uint16_t* rest, float* joined) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t r;
    high[i] = (uint16_t)split(x[i], &r);
    rest[i] = (uint16_t)r;
    joined[i] = join(high[i], rest[i]);
  }
}
