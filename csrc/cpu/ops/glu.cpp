#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

constexpr int64_t kChunk = 4096;  // contiguous tensors are one long row; it is cut into chunks of this many elements

struct Views {
  RowView gate, up;
  std::optional<RowView> grad;
  int64_t rows, n, tail;  // `rows` rows of n elements and one of `tail`

  Views(const Tensor& g, const Tensor& u, const Tensor* d) : gate(g), up(u) {
    if (d) grad.emplace(*d);
    rows = gate.count, n = gate.d, tail = 0;
    bool flat = gate.rows.stride == n && up.rows.stride == n && (!grad || grad->rows.stride == n);
    if (!flat) return;
    int64_t all = rows * n;
    n = kChunk, rows = all / n, tail = all % n;
    gate.rows.stride = up.rows.stride = n;
    if (grad) grad->rows.stride = n;
  }
};

const void* at(const void* p, int64_t bytes) { return (const char*)p + bytes; }
void* at(void* p, int64_t bytes) { return (char*)p + bytes; }

void run(const Views& v, Glu a, Kernel<Glu> kernel, int tensors) {
  a.gate = v.gate.rows, a.up = v.up.rows;
  if (v.grad) a.grad = v.grad->rows;
  a.n = v.n;
  parallel_rows(v.rows, tensors * v.n * size_of(a.type), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  if (v.tail) {
    int64_t done = v.rows * v.n * size_of(a.type);
    a.gate.data = at(a.gate.data, done), a.up.data = at(a.up.data, done);
    a.out = at(a.out, done);
    if (v.grad) a.grad.data = at(a.grad.data, done), a.out2 = at(a.out2, done);
    a.n = v.tail, a.stream = false;
    kernel(a, 0, 1);
  }
}

Glu arguments(const Tensor& gate, const Tensor& up, int64_t activation) {
  check_cpu("glu", "gate", gate);
  check_like("glu", "up", up, gate);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "bigkernels::glu: no activation number ", activation);
  Glu a = {};
  a.type = type_of(gate);
  a.activation = (Activation)activation;
  return a;
}

Tensor forward(Tensor gate, Tensor up, int64_t activation) {
  Glu a = arguments(gate, up, activation);
  Views v(gate, up, nullptr);
  Tensor out = empty_contiguous_like(gate);
  a.out = out.mutable_data_ptr();
  a.stream = worth_streaming(out, v.n * size_of(a.type), gate.numel() * size_of(a.type));
  run(v, a, table().glu_fwd, 3);
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor gate, Tensor up, int64_t activation) {
  Glu a = arguments(gate, up, activation);
  check_like("glu", "grad", grad, gate);
  Views v(gate, up, &grad);
  Tensor d_gate = empty_contiguous_like(gate), d_up = empty_contiguous_like(gate);
  a.out = d_gate.mutable_data_ptr(), a.out2 = d_up.mutable_data_ptr();
  int64_t row_bytes = v.n * size_of(a.type), bytes = gate.numel() * size_of(a.type);
  a.stream = worth_streaming(d_gate, row_bytes, bytes) && worth_streaming(d_up, row_bytes, bytes);
  run(v, a, table().glu_bwd, 5);
  return {d_gate, d_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("glu_fwd", TORCH_BOX(&forward));
  m.impl("glu_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
