// Optimizer steps: one launch for all chunks of all tensors, after one that computes the tensors' scalars on the
// device, so that the host waits for nothing and a CUDA graph can hold the step.
#include "optimizer_block.cuh"

namespace bigkernels {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;

// Thread blocks that share a chunk: one where there are chunks enough to fill a GPU, else more, down to a block of 256
// elements a warp. Depends on nothing but the number, so that sums come out the same on every GPU.
int parts_of(int64_t chunks) {
  int parts = 1;
  while (parts < (int)(kChunk / kStateBlock) / kWarps && chunks * parts < 2048) parts *= 2;
  return parts;
}

// What a thread block works on.
struct Task {
  OptimizerChunk chunk;
  int worker, workers;  // among the warps that share the chunk
  __device__ Task(const OptimizerLists& lists, int parts)
      : chunk(lists.chunks[blockIdx.x / parts]),
        worker(blockIdx.x % parts * kWarps + threadIdx.x / kLanes),
        workers(parts * kWarps) {}
};

// The total of a thread block, in the order of its warps; thread 0 gets it.
template <class F>
__device__ double over_warps(PerLane<double>& mine, const F& f) {
  __shared__ double warps[kWarps];
  __syncthreads();
  const double all = over_lanes(mine, f);
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = all;
  __syncthreads();
  double result = warps[0];
  for (int w = 1; w < kWarps; ++w) result = f(result, warps[w]);
  return result;
}

__global__ void prepare_kernel(Algorithm algorithm, OptimizerLists lists, OptimizerFactors factors, const float* trust,
                               bool first, OptimizerScalars* scalars) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < lists.tensor_count) prepare(algorithm, lists, factors, trust, first, i, scalars);
}

template <Algorithm A, bool kMeasure>
__global__ void __launch_bounds__(kThreads, states_of<A>() == 1 ? 6 : 4)
    step_kernel(OptimizerLists lists, OptimizerFactors factors, const OptimizerScalars* scalars, int parts,
                double* sums) {
  if (found_inf(factors)) return;
  const Task task(lists, parts);
  PerLane<double> mine[2] = {};
  if (lists.grads[task.chunk.tensor].data) {
    // Shared, as a register for each of their fields would leave few for elements.
    __shared__ OptimizerTensor t;
    __shared__ OptimizerGrad grad;
    __shared__ OptimizerScalars s;
    if (threadIdx.x == 0) {
      grad = lists.grads[task.chunk.tensor];
      t = lists.tensors[task.chunk.tensor];
      s = scalars[task.chunk.tensor];
      s.flags = true_flags<A>(s.flags, t);
    }
    __syncthreads();
    for_blocks(task.chunk, task.worker, task.workers,
               [&](const Block& b) { step_block<A, kMeasure>(t, grad, s, b, mine); });
  }
  if constexpr (kMeasure) {
    for (int k = 0; k < 2; ++k) {
      const double all = over_warps(mine[k], [](double a, double b) { return a + b; });
      if (threadIdx.x == 0) sums[2 * (int64_t)blockIdx.x + k] = all;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(OptimizerLists lists, int parts, bool infinity, double* values) {
  const Task task(lists, parts);
  const OptimizerGrad grad = lists.grads[task.chunk.tensor];
  PerLane<double> mine = {};
  if (grad.data)
    for_blocks(task.chunk, task.worker, task.workers, [&](const Block& b) { norm_block(grad, b, infinity, mine); });
  const double all = over_warps(mine, [infinity](double a, double b) { return infinity ? larger(a, b) : a + b; });
  if (threadIdx.x == 0) values[blockIdx.x] = all;
}

// A warp a tensor. `factors`: as of the pass that made the values.
__global__ void total_kernel(OptimizerLists lists, OptimizerFactors factors, const double* values, int parts,
                             int columns, bool infinity, double* out) {
  const int64_t tensor = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
  if (tensor < lists.tensor_count && !found_inf(factors)) total(lists, tensor, values, parts, columns, infinity, out);
}

unsigned grid(int64_t count, int each) { return (unsigned)((count + each - 1) / each); }

// In this order, so that the values are aligned.
double* values_in(void* workspace) { return (double*)workspace; }
OptimizerScalars* scalars_in(void* workspace, int64_t chunks) {
  return (OptimizerScalars*)(values_in(workspace) + 2 * chunks * parts_of(chunks));
}

// The runtime in this library is another copy than torch's.
cudaError_t use(int device, int64_t chunks) {
  if (chunks * parts_of(chunks) > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return cudaSetDevice(device);
}

const char* message(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

}  // namespace

int64_t optimizer_workspace(int64_t tensor_count, int64_t chunk_count) {
  return 2 * chunk_count * parts_of(chunk_count) * (int64_t)sizeof(double) +
         tensor_count * (int64_t)sizeof(OptimizerScalars);
}

const char* optimizer_step(Algorithm algorithm, const OptimizerLists& lists, const OptimizerFactors& factors,
                           const float* trust, void* workspace, int device, void* stream) {
  if (cudaError_t e = use(device, lists.chunk_count)) return message(e);
  OptimizerScalars* scalars = scalars_in(workspace, lists.chunk_count);
  const int parts = parts_of(lists.chunk_count);
  cudaStream_t s = (cudaStream_t)stream;
  if (lists.tensor_count)
    prepare_kernel<<<grid(lists.tensor_count, 128), 128, 0, s>>>(algorithm, lists, factors, trust, !trust, scalars);
  if (lists.chunk_count) {
    const unsigned blocks = grid(lists.chunk_count * parts, 1);
    by_algorithm(algorithm, [&](auto rule) {
      step_kernel<decltype(rule)::kAlgorithm, false>
          <<<blocks, kThreads, 0, s>>>(lists, factors, scalars, parts, nullptr);
    });
  }
  return message(cudaGetLastError());
}

const char* optimizer_measure(const OptimizerLists& lists, const OptimizerFactors& factors, double* sums,
                              void* workspace, int device, void* stream) {
  if (!lists.tensor_count) return nullptr;
  if (cudaError_t e = use(device, lists.chunk_count)) return message(e);
  OptimizerScalars* scalars = scalars_in(workspace, lists.chunk_count);
  double* values = values_in(workspace);
  const int parts = parts_of(lists.chunk_count);
  cudaStream_t s = (cudaStream_t)stream;
  prepare_kernel<<<grid(lists.tensor_count, 128), 128, 0, s>>>(Algorithm::lamb, lists, factors, nullptr, true, scalars);
  if (lists.chunk_count)
    step_kernel<Algorithm::lamb, true>
        <<<grid(lists.chunk_count * parts, 1), kThreads, 0, s>>>(lists, factors, scalars, parts, values);
  total_kernel<<<grid(lists.tensor_count, kWarps), kThreads, 0, s>>>(lists, factors, values, parts, 2, false, sums);
  return message(cudaGetLastError());
}

const char* optimizer_norm(const OptimizerLists& lists, double* out, bool infinity, void* workspace, int device,
                           void* stream) {
  if (!lists.tensor_count) return nullptr;
  if (cudaError_t e = use(device, lists.chunk_count)) return message(e);
  double* values = values_in(workspace);
  const int parts = parts_of(lists.chunk_count);
  cudaStream_t s = (cudaStream_t)stream;
  if (lists.chunk_count)
    norm_kernel<<<grid(lists.chunk_count * parts, 1), kThreads, 0, s>>>(lists, parts, infinity, values);
  total_kernel<<<grid(lists.tensor_count, kWarps), kThreads, 0, s>>>(lists, {}, values, parts, 1, infinity, out);
  return message(cudaGetLastError());
}

}  // namespace cuda
}  // namespace bigkernels
