#include "few_launch.cuh"

namespace bigkernels {
namespace cuda {

bool few_book4(const FewProduct& p, int device, FewLaunch* launch, cudaError_t* error) {
  return prepare<FewCode::book4>(p, device, launch, error);
}

}  // namespace cuda
}  // namespace bigkernels
