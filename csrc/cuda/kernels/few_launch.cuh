// How a linear layer of a few tokens is launched. One source file a code instantiates the kernels: that is where the
// compiler's time goes.
#pragma once
#include "few_kinds.cuh"

namespace bigkernels {
namespace cuda {

typedef void (*FewKernel)(FewProduct, Line, int, void*, int*);

// What is launched for a product on a device.
struct FewLaunch {
  FewKernel kernel = nullptr;
  Line line;
  int stages = 0, bytes = 0, threads = 0, counters = 0;
  int64_t workspace = 0;
};

// Of each code; false: there is no such kernel.
bool few_int4(const FewProduct&, int device, FewLaunch*, cudaError_t*);
bool few_book4(const FewProduct&, int device, FewLaunch*, cudaError_t*);
bool few_int8(const FewProduct&, int device, FewLaunch*, cudaError_t*);
bool few_fp8(const FewProduct&, int device, FewLaunch*, cudaError_t*);

namespace {

// How many blocks the compiler is to leave registers for: as many as shared memory lets in. Left to itself it spills
// some of small kernels for more; of large ones it spills where it is told (0: it is not).
template <class K>
constexpr int kTogether = K::kColumns <= 2 || (K::kColumns == 4 && K::kGroup == 0) ? 2 : 1;

template <class K>
__global__ void __launch_bounds__(Parts<K>::kWarps* kLanes, kTogether<K>)
    few_kernel(const __grid_constant__ FewProduct p, const __grid_constant__ Line line, int stages, void* workspace,
               int* counters) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) char shared[];
  Block<K> block(p, line, (int)blockIdx.x, stages, shared, workspace, counters);
  block.run();
#endif
}

// Three stages if two blocks can then share a multiprocessor, or if one has it alone; else two.
template <class K>
cudaError_t shape(const FewProduct& p, int device, FewLaunch* l) {
  typedef Parts<K> S;
  int processors, each, most;
  cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!e) e = cudaDeviceGetAttribute(&each, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (!e) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e) return e;
  constexpr int kReserved = 1024;  // of each block, by the driver
  int together = 2;
  const auto fits = [&](int stages) {
    const int bytes = S::bytes(p, stages);
    return bytes <= most && together * (bytes + kReserved) <= each;
  };
  if (!fits(3)) together = 1;
  l->stages = fits(3) ? 3 : 2;
  if (!fits(l->stages)) return cudaErrorInvalidConfiguration;
  l->bytes = S::bytes(p, l->stages);
  l->line = Line::of<K>(p, together * processors);
  l->threads = S::kWarps * kLanes;
  l->counters = l->line.tiles;
  l->workspace = (int64_t)2 * l->line.blocks() * S::kSums * 16;
  return cudaSuccess;
}

template <FewCode kCode>
bool prepare(const FewProduct& p, int device, FewLaunch* launch, cudaError_t* error) {
  return with_kind<kCode>(p, [&](auto kind) {
    typedef decltype(kind) K;
    launch->kernel = few_kernel<K>;
    *error = shape<K>(p, device, launch);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
