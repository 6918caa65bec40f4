// Records of a step program by themselves, as tests and measurements run them: structs as bytes, values by address.
#include <bigkernels/program.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using namespace bigkernels;

namespace {

template <class T>
T of_bytes(const std::string& bytes) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (bytes.size() != sizeof(T)) throw std::invalid_argument("a struct has " + std::to_string(sizeof(T)) + " bytes");
  T t;
  std::memcpy(&t, bytes.data(), sizeof(T));
  return t;
}

struct Values {
  std::vector<float*> address;
  const std::vector<int32_t>& width;
  Values(const std::vector<int64_t>& a, const std::vector<int32_t>& w) : width(w) {
    for (int64_t x : a) address.push_back((float*)x);
  }
};

struct Memory {
  std::unique_ptr<char, decltype(&std::free)> data;
  explicit Memory(int64_t bytes) : data((char*)std::aligned_alloc(64, (bytes + 64) / 64 * 64), std::free) {}
};

void heads(const std::string& record, const std::string& run, const std::vector<int64_t>& values,
           const std::vector<int32_t>& widths) {
  Run r = of_bytes<Run>(run);
  Values v(values, widths);
  program_table().heads(of_bytes<HeadsRecord>(record), r, v.address.data(), widths.data(), 0, r.rows(), nullptr);
}

// Returns how the record was cut, and the seconds that its chunks and their merge took. `backwards` makes the chunks
// twice, in another order.
py::dict attend(const std::string& record, const std::string& run, std::vector<int64_t> values,
                std::vector<int32_t> widths, bool backwards, int64_t threads) {
  Run r = of_bytes<Run>(run);
  AttendRecord a = of_bytes<AttendRecord>(record);
  const ProgramTable& kernels = program_table();
  AttendPlan plan = kernels.attend_plan(a, r, threads);
  Memory workspace(plan.workspace), state(plan.state * sizeof(float));
  a.state = (Value)values.size();
  values.push_back((int64_t)state.data.get()), widths.push_back(0);
  Values v(values, widths);
  auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < plan.chunks; ++i)
    kernels.attend(a, r, plan, i, v.address.data(), widths.data(), workspace.data.get());
  if (backwards)
    for (int64_t i = plan.chunks; i-- > 0;)
      kernels.attend(a, r, plan, i, v.address.data(), widths.data(), workspace.data.get());
  if (plan.parts > 1)
    for (int64_t row = 0; row < r.rows(); ++row)
      kernels.attend_merge(a, r, plan, v.address.data(), widths.data(), row, row + 1);
  py::dict result;
  result["chunks"] = plan.chunks, result["parts"] = plan.parts, result["rows"] = plan.rows, result["keys"] = plan.keys;
  result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace

void bind_program(py::module_& m) {
  m.def("program_heads", &heads, py::arg("record"), py::arg("run"), py::arg("values"), py::arg("widths"),
        "Op::heads of all tokens. `record` and `run` are structs as bytes, `values` the addresses of rows of floats.");
  m.def("program_attend", &attend, py::arg("record"), py::arg("run"), py::arg("values"), py::arg("widths"),
        py::arg("backwards") = false, py::arg("threads") = 1, "Op::attend; returns how it was cut, and its seconds.");
}
