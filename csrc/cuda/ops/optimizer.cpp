// Optimizer steps on a GPU: the records of bigkernels/optim/_plan.py, which has checked what they point to and keeps it
// alive, to the kernels. What the records say is on the device, and no call here waits for it.
#include <bigkernels/stable_cuda.h>
// After it, as torch's headers come first.
#include <bigkernels/cuda.h>

namespace bigkernels {
namespace cuda {
namespace {

class Call {
 public:
  Call(const char* op, const Tensor& tensors, const Tensor& grads, const Tensor& chunks)
      : op_(op), device_(tensors.get_device_index()), guard_(device_) {
    int64_t grad_count;
    lists.tensors = records<OptimizerTensor>("tensors", tensors, &lists.tensor_count);
    lists.grads = records<OptimizerGrad>("grads", grads, &grad_count);
    lists.chunks = records<OptimizerChunk>("chunks", chunks, &lists.chunk_count);
    STD_TORCH_CHECK(lists.tensor_count == grad_count, "bigkernels::", op_, ": not one gradient a tensor");
  }

  void groups(const Tensor& groups) {
    int64_t count;
    lists.groups = records<OptimizerGroup>("groups", groups, &count);
    STD_TORCH_CHECK(count > 0 || !lists.tensor_count, "bigkernels::", op_, ": no groups");
  }

  void factors(const MaybeTensor& grad_scale, const MaybeTensor& found_inf, const MaybeTensor& divisor,
               const MaybeTensor& norm, double max_norm) {
    given = {scalar("grad_scale", grad_scale), scalar("found_inf", found_inf), scalar("divisor", divisor),
             scalar("norm", norm), max_norm};
  }

  // `columns` numbers a tensor.
  void* numbers(const char* name, const Tensor& t, ScalarType dtype, int64_t columns) const {
    check_here(name, t);
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == columns * lists.tensor_count,
                    "bigkernels::", op_, ": ", name, " must be contiguous ",
                    dtype == ScalarType::Double ? "float64" : "float32", ", ", columns, " a tensor");
    return t.mutable_data_ptr();
  }

  // run(workspace, device, stream)
  template <class F>
  void queue(const F& run) const {
    Workspace workspace(optimizer_workspace(lists.tensor_count, lists.chunk_count), device_);
    const char* error = run(workspace.data(), device_, current_stream(device_));
    STD_TORCH_CHECK(!error, "bigkernels::", op_, ": ", error);
  }

  OptimizerLists lists = {};
  OptimizerFactors given;

 private:
  void check_here(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, "bigkernels::", op_, ": ", name,
                    " is on another device than the tensors' records");
  }

  template <class T>
  const T* records(const char* name, const Tensor& t, int64_t* count) const {
    check_here(name, t);
    const int64_t bytes = t.numel() * t.element_size();
    STD_TORCH_CHECK(t.is_contiguous() && bytes % sizeof(T) == 0 && (uintptr_t)t.const_data_ptr() % alignof(T) == 0,
                    "bigkernels::", op_, ": ", name, " is no list of records");
    *count = bytes / (int64_t)sizeof(T);
    return (const T*)t.const_data_ptr();
  }

  Scalar scalar(const char* name, const MaybeTensor& t) const {
    if (!t) return {};
    check_here(name, *t);
    const bool is_double = t->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(t->numel() == 1 && (is_double || t->scalar_type() == ScalarType::Float), "bigkernels::", op_, ": ",
                    name, " must be one float32 or float64");
    return {t->const_data_ptr(), is_double};
  }

  const char* op_;
  int32_t device_;
  DeviceGuard guard_;
};

void step(int64_t algorithm, Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, MaybeTensor grad_scale,
          MaybeTensor found_inf, MaybeTensor divisor, MaybeTensor norm, double max_norm, MaybeTensor trust) {
  Call call("optimizer_step", tensors, grads, chunks);
  STD_TORCH_CHECK(algorithm >= 0 && algorithm <= (int64_t)kLastAlgorithm, "bigkernels::optimizer_step: no algorithm ",
                  algorithm);
  call.groups(groups);
  call.factors(grad_scale, found_inf, divisor, norm, max_norm);
  const float* ratios = trust ? (const float*)call.numbers("trust", *trust, ScalarType::Float, 1) : nullptr;
  call.queue([&](void* workspace, int device, void* stream) {
    return optimizer_step((Algorithm)algorithm, call.lists, call.given, ratios, workspace, device, stream);
  });
}

void measure(Tensor tensors, Tensor grads, Tensor chunks, Tensor groups, MaybeTensor grad_scale, MaybeTensor found_inf,
             MaybeTensor divisor, MaybeTensor norm, double max_norm, Tensor sums) {
  Call call("optimizer_measure", tensors, grads, chunks);
  call.groups(groups);
  call.factors(grad_scale, found_inf, divisor, norm, max_norm);
  double* out = (double*)call.numbers("sums", sums, ScalarType::Double, 2);
  call.queue([&](void* workspace, int device, void* stream) {
    return optimizer_measure(call.lists, call.given, out, workspace, device, stream);
  });
}

void norms(Tensor tensors, Tensor grads, Tensor chunks, Tensor out, bool infinity) {
  Call call("optimizer_norm", tensors, grads, chunks);
  double* values = (double*)call.numbers("out", out, ScalarType::Double, 1);
  call.queue([&](void* workspace, int device, void* stream) {
    return optimizer_norm(call.lists, values, infinity, workspace, device, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CUDA, m) {
  m.impl("optimizer_step", TORCH_BOX(&step));
  m.impl("optimizer_measure", TORCH_BOX(&measure));
  m.impl("optimizer_norm", TORCH_BOX(&norms));
}

}  // namespace cuda
}  // namespace bigkernels
