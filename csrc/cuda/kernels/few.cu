// Linear layers of a few tokens: which kernel, and its launch.
#include <mutex>
#include <set>

#include "few_launch.cuh"

namespace bigkernels {
namespace cuda {
namespace {

const char* message(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

const char* find(const FewProduct& p, int device, FewLaunch* launch) {
  // The runtime in this library is another copy than torch's.
  if (cudaError_t e = cudaSetDevice(device)) return message(e);
  int major;
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e) return message(e);
  if (major < 8) return "it needs a GPU of compute capability 8.0 or newer";
  bool launched = false;
  switch (p.code) {
    case FewCode::int4: launched = few_int4(p, device, launch, &e); break;
    case FewCode::book4: launched = few_book4(p, device, launch, &e); break;
    case FewCode::int8: launched = few_int8(p, device, launch, &e); break;
    case FewCode::fp8: launched = few_fp8(p, device, launch, &e); break;
  }
  return launched ? message(e) : "there is no kernel for this format, dtype and number of tokens";
}

// A kernel may use more shared memory than all GPUs have once it was told so, on each device.
cudaError_t allow(const FewLaunch& l, int device) {
  static std::mutex mutex;
  static std::set<std::pair<FewKernel, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({l.kernel, device})) return cudaSuccess;
  int most;
  cudaError_t e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!e) e = cudaFuncSetAttribute((const void*)l.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (!e) allowed.insert({l.kernel, device});
  return e;
}

}  // namespace

const char* few_product_needs(const FewProduct& p, int device, int64_t* workspace, int* counters) {
  FewLaunch l;
  if (const char* e = find(p, device, &l)) return e;
  *workspace = l.workspace, *counters = l.counters;
  return nullptr;
}

const char* few_product(const FewProduct& p, void* workspace, int* counters, int device, void* stream) {
  FewLaunch l;
  if (const char* e = find(p, device, &l)) return e;
  if (cudaError_t e = allow(l, device)) return message(e);
  l.kernel<<<l.line.blocks(), l.threads, l.bytes, (cudaStream_t)stream>>>(p, l.line, l.stages, workspace, counters);
  return message(cudaGetLastError());
}

const char* capture_of(void* stream, int device, bool* capturing, uint64_t* id) {
  if (cudaError_t e = cudaSetDevice(device)) return message(e);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  if (cudaError_t e = cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &number)) return message(e);
  *capturing = status != cudaStreamCaptureStatusNone, *id = *capturing ? number : 0;
  return nullptr;
}

const char* zero(void* memory, int64_t bytes, int device, void* stream) {
  if (cudaError_t e = cudaSetDevice(device)) return message(e);
  return message(cudaMemsetAsync(memory, 0, (size_t)bytes, (cudaStream_t)stream));
}

const char* wait_for(int device, void* stream) {
  if (cudaError_t e = cudaSetDevice(device)) return message(e);
  return message(cudaStreamSynchronize((cudaStream_t)stream));
}

}  // namespace cuda
}  // namespace bigkernels
