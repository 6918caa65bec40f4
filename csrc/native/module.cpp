// bigkernels._native: the CPU kernels' building blocks and machine probes, for tests and the benchmark engine.
// Development builds only: the release wheel leaves it out and so stays independent of the Python version.
#include <bigkernels/table.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;
using namespace bigkernels;

void bind_products(py::module_&);
void bind_program(py::module_&);

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const std::vector<std::string> kFunctions = {"exp", "sigmoid", "tanh", "normal_cdf", "normal_pdf", "exp2"};
const std::vector<std::string> kMatrixTypes = {"float32", "bfloat16", "int8"};

int index_of(const std::vector<std::string>& names, const std::string& name, const char* what) {
  auto at = std::find(names.begin(), names.end(), name);
  if (at == names.end()) throw std::invalid_argument(std::string(what) + " has no " + name);
  return (int)(at - names.begin());
}

Array<float> vector_math(const std::string& function, const Array<float>& x) {
  int number = index_of(kFunctions, function, "vector_math");
  Array<float> y(x.size());
  table().vector_math(number, x.data(), y.mutable_data(), x.size());
  return y;
}

Type half_type(const std::string& name) {
  if (name == "bfloat16") return Type::bf16;
  if (name == "float16") return Type::f16;
  throw std::invalid_argument("a 16-bit type is bfloat16 or float16, not " + name);
}

Array<uint16_t> narrow(const std::string& type, const Array<float>& x) {
  Array<uint16_t> y(x.size());
  table().convert(half_type(type), true, x.data(), y.mutable_data(), x.size());
  return y;
}

Array<float> widen(const std::string& type, const Array<uint16_t>& x) {
  Array<float> y(x.size());
  table().convert(half_type(type), false, x.data(), y.mutable_data(), x.size());
  return y;
}

int thread_count(int threads) { return threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency()); }

// Runs f(thread) in `threads` threads at once; returns the seconds until the last one ended.
template <class F>
double timed(int threads, const F& f) {
  auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(f, t);
  f(0);
  for (auto& t : pool) t.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// How often a thread goes over its share in one pass: starting the threads takes tens of microseconds, in which a core
// moves some megabytes of what its caches hold.
int64_t repeats(int64_t bytes) { return std::max<int64_t>(1, (64 << 20) / std::max<int64_t>(bytes, 1)); }

// Bytes read plus bytes written a second: the best of the passes made in `seconds`, with cached and with streaming
// stores.
double copy_bandwidth(int64_t bytes, double seconds, int threads) {
  threads = thread_count(threads);
  int64_t share = bytes / threads / 128 * 128;
  if (share <= 0) throw std::invalid_argument("copy_bandwidth: too few bytes");
  std::unique_ptr<char, decltype(&std::free)> from((char*)std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096),
                                                   std::free);
  std::unique_ptr<char, decltype(&std::free)> to((char*)std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096),
                                                 std::free);
  if (!from || !to) throw std::bad_alloc();
  std::fill_n(from.get(), bytes, 1);
  std::fill_n(to.get(), bytes, 0);
  py::gil_scoped_release release;
  double best = 0, spent = 0;
  for (int pass = 0; spent < seconds || pass < 4; ++pass) {
    double t = timed(threads, [&](int i) {
      for (int64_t r = 0; r < repeats(bytes); ++r)
        table().copy(from.get() + i * share, to.get() + i * share, share, pass % 2);
    });
    spent += t;
    best = std::max(best, 2.0 * share * threads * repeats(bytes) / t);
  }
  return best;
}

// Bytes read a second: the best of the passes made in `seconds`, over one, two, four and eight streams a thread.
double read_bandwidth(int64_t bytes, double seconds, int threads) {
  threads = thread_count(threads);
  int64_t share = bytes / threads / 4096 * 4096;
  if (share <= 0) throw std::invalid_argument("read_bandwidth: too few bytes");
  std::unique_ptr<char, decltype(&std::free)> from((char*)std::aligned_alloc(4096, share * threads), std::free);
  if (!from) throw std::bad_alloc();
  std::fill_n(from.get(), share * threads, 0);
  py::gil_scoped_release release;
  std::atomic<float> total{0};
  double best = 0, spent = 0;
  for (int pass = 0; spent < seconds || pass < 4; ++pass) {
    double t = timed(threads, [&](int i) {
      for (int64_t r = 0; r < repeats(bytes); ++r)
        total = total + table().sum_of(from.get() + i * share, share, 1 << pass % 4);
    });
    spent += t;
    best = std::max(best, share * threads * repeats(bytes) / t);
  }
  return best + total;  // zero, but the sums are used
}

// Bytes read plus bytes written a second when three of four arrays, of `bytes` together, are updated in place from the
// fourth: the best of the passes made in `seconds`, with and without prefetching.
double update_bandwidth(int64_t bytes, double seconds, int threads) {
  threads = thread_count(threads);
  int64_t share = bytes / 4 / threads / 4096 * 4096;
  if (share <= 0) throw std::invalid_argument("update_bandwidth: too few bytes");
  // The arrays start at different places in their pages: loads may be taken to depend on stores with the same low bits.
  constexpr int64_t kApart = 4096 + 1024;
  int64_t array_bytes = share * threads + kApart, all = (4 * array_bytes + 4095) / 4096 * 4096;
  std::unique_ptr<char, decltype(&std::free)> memory((char*)std::aligned_alloc(4096, all), std::free);
  if (!memory) throw std::bad_alloc();
  std::fill_n(memory.get(), all, 0);
  py::gil_scoped_release release;
  double best = 0, spent = 0;
  for (int pass = 0; spent < seconds || pass < 4; ++pass) {
    double t = timed(threads, [&](int i) {
      auto part = [&](int array) { return memory.get() + array * array_bytes + i * share; };
      for (int64_t r = 0; r < repeats(bytes); ++r) table().update(part(0), part(1), part(2), part(3), share, pass % 2);
    });
    spent += t;
    best = std::max(best, 7.0 * share * threads * repeats(bytes) / t);
  }
  return best;
}

// Operations a second of register-only multiply-adds; 0 where this level has no unit for the type.
double matrix_peak(const std::string& type, double seconds, int threads) {
  int number = index_of(kMatrixTypes, type, "matrix_peak");
  threads = thread_count(threads);
  py::gil_scoped_release release;
  int64_t rounds = 1 << 16;
  if (!table().matrix_loop(number, 1)) return 0;
  double best = 0, spent = 0;
  for (int pass = 0; spent < seconds || pass < 4; ++pass) {
    std::atomic<int64_t> operations{0};
    double t = timed(threads, [&](int) { operations += table().matrix_loop(number, rounds); });
    spent += t;
    best = std::max(best, operations / t);
    if (t < 0.01) rounds *= 2;
  }
  return best;
}

std::vector<std::string> matrix_dtypes() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kMatrixTypes.size(); ++i)
    if (table().matrix_loop((int)i, 1)) names.push_back(kMatrixTypes[i]);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "White-box access to the CPU kernels and machine probes (development builds only).";
  m.def("cpu_isa", [] { return std::string(isa_name()); }, "The chosen ISA level.");
  m.def("vector_math", &vector_math, py::arg("function"), py::arg("x"),
        "exp, sigmoid, tanh, normal_cdf or normal_pdf of float32 values, by the kernels' vector code.");
  m.def("narrow", &narrow, py::arg("type"), py::arg("x"), "float32 to the bits of bfloat16 or float16.");
  m.def("widen", &widen, py::arg("type"), py::arg("bits"), "The bits of bfloat16 or float16 to float32.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("bytes"), py::arg("seconds"), py::arg("threads") = 0,
        "Bytes read and written a second when copying a buffer of `bytes`, in all threads.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("seconds"), py::arg("threads") = 0,
        "Bytes read a second when summing a buffer of `bytes`, in all threads.");
  m.def("update_bandwidth", &update_bandwidth, py::arg("bytes"), py::arg("seconds"), py::arg("threads") = 0,
        "Bytes read and written a second when three of four arrays, of `bytes` together, are updated in place from the "
        "fourth, in all threads.");
  m.def("matrix_peak", &matrix_peak, py::arg("dtype"), py::arg("seconds"), py::arg("threads") = 0,
        "Operations a second (a multiply-add is two) of the level's matrix or vector unit, in all threads.");
  bind_program(m);
  m.def("matrix_dtypes", &matrix_dtypes, "The types that matrix_peak can measure here.");
  bind_products(m);
}
