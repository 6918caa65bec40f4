// The step program's products on memory that the caller names by address.
#include <bigkernels/program.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <vector>

namespace py = pybind11;
using namespace bigkernels;

namespace {

template <class T>
const T* at(uintptr_t address) {
  return (const T*)address;
}

Weight weight(int kind, int64_t n, int64_t k, uintptr_t codes, int64_t code_row, uintptr_t scale, uintptr_t zero,
              uintptr_t row_scale, uintptr_t book, int64_t group, bool transposed) {
  Weight w{};
  w.n = n, w.k = k, w.kind = (Codes)kind, w.codes = at<uint8_t>(codes), w.code_row = code_row;
  w.scale = at<void>(scale), w.zero = at<uint16_t>(zero), w.row_scale = at<float>(row_scale), w.book = at<float>(book);
  w.group = group, w.groups = group ? (k + group - 1) / group : 0, w.transposed = transposed;
  return w;
}

struct Memory {
  void* data;
  explicit Memory(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Memory() { std::free(data); }
};

// Fills out (m, n) by chunks of rows that end at `ends`; returns the seconds of the fastest of `rounds` products, and
// of the fastest preparation of the tokens.
std::pair<double, double> product(const Weight& w, int32_t integers, uintptr_t x, int64_t m, uintptr_t out,
                                  const std::vector<int64_t>& ends, int rounds) {
  const ProgramTable& t = program_table();
  Memory ready(t.product_ready(w, integers, m)), workspace(t.product_workspace(w, integers, m, w.n));
  py::gil_scoped_release release;
  double best[2] = {1e9, 1e9};
  auto timed = [&](double& seconds, auto f) {
    auto begin = std::chrono::steady_clock::now();
    f();
    seconds = std::min(seconds, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  };
  for (int r = 0; r < rounds; ++r) {
    timed(best[1], [&] {
      t.product_prepare(w, integers, at<float>(x), w.k, m, 0, m / 2, ready.data);
      t.product_prepare(w, integers, at<float>(x), w.k, m, m / 2, m, ready.data);
    });
    timed(best[0], [&] {
      int64_t begin = 0;
      for (int64_t end : ends) {
        t.product(w, integers, ready.data, m, begin, end, (float*)out + begin, w.n, workspace.data);
        begin = end;
      }
    });
  }
  return {best[0], best[1]};
}

// Gives a weight panels of its own, at `memory`; returns how many bytes they take, 0: it has none. Without memory it
// only tells.
int64_t panels(Weight& w, int32_t integers, uintptr_t memory) {
  const int64_t bytes = program_table().panel_bytes(w, integers), count = (w.n + 15) / 16;
  if (memory && bytes) {
    w.panels = at<uint8_t>(memory), w.panel_step = bytes;
    program_table().make_panels(w, 0, count / 2);
    program_table().make_panels(w, count / 2, count);
  }
  return bytes * count;
}

}  // namespace

void bind_products(py::module_& m) {
  m.def(
      "codes",
      [] {
        py::list rows;
        for (const CodesRow& r : kCodes)
          rows.append(py::make_tuple(r.name, r.bits, r.is_signed, r.scale_bytes, r.blocked, r.zero, r.row_scale, r.book,
                                     r.block, r.block_bytes));
        return rows;
      },
      "The traits of each kind of codes, by number.");
  py::class_<Weight>(m, "Weight")
      .def(py::init(&weight), py::arg("kind"), py::arg("n"), py::arg("k"), py::arg("codes"), py::arg("code_row"),
           py::arg("scale") = 0, py::arg("zero") = 0, py::arg("row_scale") = 0, py::arg("book") = 0,
           py::arg("group") = 0, py::arg("transposed") = false);
  m.def(
      "product_form", [](const Weight& w, int32_t integers) { return program_table().product_form(w, integers); },
      py::arg("weight"), py::arg("integers"), "Equal for weights whose tokens may be made ready together.");
  m.def("panels", &panels, py::arg("weight"), py::arg("integers"), py::arg("memory") = 0,
        "Makes panels of a weight at an address, for its products; returns their bytes.");
  m.def("product", &product, py::arg("weight"), py::arg("integers"), py::arg("x"), py::arg("m"), py::arg("out"),
        py::arg("ends"), py::arg("rounds") = 1,
        "Fills float32 rows at `out` with the products of float32 rows at `x`, the weight's rows in chunks that end at "
        "`ends`; returns the least seconds of `rounds`: of the product, and of making the tokens ready.");
}
