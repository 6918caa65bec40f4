// GroupNorm and BatchNorm of dense tensors (N, C, ...): the Python side makes them so.
#include <bigkernels/layers.h>
#include <bigkernels/stable.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace bigkernels {
namespace {

// The strides of a dense tensor of planes (N, C, ...), or of rows, whose channels are innermost; whether x has them.
struct Layout {
  int64_t dim, sizes[kMaxDim], strides[kMaxDim];
  bool fits = true;

  Layout(const char* op, const Tensor& x, bool rows) : dim(x.dim()) {
    STD_TORCH_CHECK(dim >= 2 && dim <= kMaxDim, "bigkernels::", op, ": tensors must have 2 to 16 dimensions");
    int64_t dense = 1;
    for (int64_t i = 0; i < dim; ++i) sizes[i] = x.size(i);
    for (int64_t i = 0; i < dim; ++i) {
      int64_t at = !rows ? dim - 1 - i : i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;
      strides[at] = dense;
      fits = fits && (sizes[at] <= 1 || x.stride(at) == dense);
      dense *= sizes[at];
    }
    fits = fits || dense == 0;
  }
};

struct Shape {
  int64_t n, c, s = 1;  // batch, channels, pixels
  bool rows;
  Type type;
  Layout layout;

  Shape(const char* op, const Tensor& x, bool as_rows) : rows(as_rows), type(type_of(x)), layout(op, x, as_rows) {
    check_cpu(op, "x", x);
    STD_TORCH_CHECK(layout.fits, "bigkernels::", op, ": x does not lie in planes, or in rows");
    n = x.size(0), c = x.size(1);
    for (int64_t i = 2; i < x.dim(); ++i) s *= x.size(i);
  }
  int64_t bytes() const { return n * c * s * size_of(type); }
  int64_t plane(int64_t i) const { return i * s; }  // where plane i = (n, c) begins
  Tensor empty(const Tensor& like) const {
    return empty_strided(layout.sizes, layout.strides, layout.dim, like.scalar_type(), bytes());
  }
};

void check_other(const char* op, const char* name, const Tensor& t, const Tensor& x, bool rows) {
  check_like(op, name, t, x);
  STD_TORCH_CHECK(Layout(op, t, rows).fits, "bigkernels::", op, ": ", name, " does not lie as x does");
}

ChannelNorm arguments(const char* op, const Shape& shape, const Tensor& x, int64_t activation) {
  STD_TORCH_CHECK(
      (activation >= 0 && activation <= (int64_t)Activation::relu) || activation == (int64_t)Activation::identity,
      "bigkernels::", op, ": no activation number ", activation);
  ChannelNorm a{};
  a.x = x.const_data_ptr();
  a.type = shape.type, a.act = (Activation)activation, a.n = shape.c;
  return a;
}
// Whether planes, or rows, begin on lines of the cache and the whole is worth it.
bool streams(const Shape& shape, const void* out) {
  return !out || worth_streaming(out, (shape.rows ? shape.c : shape.s) * size_of(shape.type), shape.bytes());
}

struct Moments {
  double mean, variance;
};
// From sums of x - guess and its square over `count` elements.
Moments moments_of(double guess, const double* sums, double count) {
  double left = sums[0] / count;
  return {guess + left, std::max(sums[1] / count - left * left, 0.0)};
}
// A guess so far from the mean that the square cost digits: the sums are taken once more, about the mean.
bool is_poor(double guess, const Moments& m) {
  double left = m.mean - guess;
  return left * left > 64 * m.variance;
}

// Of the runs [begin(i), begin(i) + length), i < count.
template <class Begin>
Moments moments_of_runs(ChannelNorm a, int64_t count, int64_t length, const Begin& begin) {
  auto kernel = layer_table().norm_run_moments;
  double sums[2] = {0, 0}, all = (double)count * length;
  float guess = 0;
  a.mean = &guess;
  int64_t few = std::min<int64_t>(length, 64);
  kernel(a, begin(0), begin(0) + few, sums);
  guess = (float)(sums[0] / few);
  for (int pass = 0;; ++pass) {
    sums[0] = sums[1] = 0;
    for (int64_t i = 0; i < count; ++i) kernel(a, begin(i), begin(i) + length, sums);
    Moments m = moments_of(guess, sums, all);
    if (pass > 0 || !is_poor(guess, m)) return m;
    guess = (float)m.mean;
  }
}

// Sums of columns of `segments` segments of `per` rows each: (segments, 2, c), cut into blocks whose sums are added in
// order.
template <class Run>
std::vector<double> column_sums(const Shape& shape, int64_t segments, int64_t per, int arrays, const Run& run) {
  int64_t c = shape.c, blocks = segments >= torch::stable::get_num_threads()
                                    ? 1
                                    : block_count(per, arrays * c * size_of(shape.type));
  std::vector<double> total(segments * blocks * 2 * c);
  parallel_tasks(segments * blocks, [&](int64_t i) {
    std::vector<float> recent(2 * c);
    int64_t segment = i / blocks, b = i % blocks;
    run(segment, segment * per + per * b / blocks, segment * per + per * (b + 1) / blocks, recent.data(),
        total.data() + i * 2 * c);
  });
  if (blocks == 1) return total;
  std::vector<double> sums(segments * 2 * c);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < 2 * c; ++j) sums[s * 2 * c + j] += total[(s * blocks + b) * 2 * c + j];
  return sums;
}

// The moments of the columns of each segment, (segments, c), as sums about `guess`, which is filled too.
std::vector<double> column_moments(const Shape& shape, ChannelNorm a, int64_t segments, int64_t per,
                                   std::vector<float>& guess) {
  auto kernel = layer_table().norm_rows_moments;
  int64_t c = shape.c, few = std::min<int64_t>(per, 16);
  guess.assign(segments * c, 0);
  auto sums_of = [&](int64_t rows) {
    return column_sums(shape, segments, per, 1, [&](int64_t s, int64_t begin, int64_t end, float* recent, double* to) {
      ChannelNorm part = a;
      part.mean = guess.data() + s * c;
      kernel(part, begin, std::min(end, s * per + rows), recent, to);
    });
  };
  std::vector<double> sums = sums_of(few);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t j = 0; j < c; ++j) guess[s * c + j] = (float)(sums[s * 2 * c + j] / few);
  sums = sums_of(per);
  bool poor = false;
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t j = 0; j < c; ++j) {
      const double both[2] = {sums[s * 2 * c + j], sums[(s * 2 + 1) * c + j]};
      Moments m = moments_of(guess[s * c + j], both, (double)per);
      poor |= is_poor(guess[s * c + j], m);
    }
  if (!poor) return sums;
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t j = 0; j < c; ++j) guess[s * c + j] += (float)(sums[s * 2 * c + j] / (double)per);
  return sums_of(per);
}

// What belongs to each channel of each image, or of all: scale and shift of forward, factors of backward.
struct Channels {
  std::vector<float> mean, scale, shift, rstd, of_grad, of_x, constant;

  explicit Channels(int64_t count, bool backward) : mean(count), scale(count), shift(count) {
    if (backward)
      for (auto* v : {&rstd, &of_grad, &of_x, &constant}) v->resize(count);
  }
  void forward(int64_t i, float m, float r, const float* weight, const float* bias, int64_t c) {
    mean[i] = m, scale[i] = r * (weight ? weight[c] : 1.0f), shift[i] = bias ? bias[c] : 0.0f;
    if (!rstd.empty()) rstd[i] = r;
  }
  // With the means of g * weight and of g * weight * (x - mean) * rstd over what shares the moments.
  void backward(int64_t i, double of_g, double of_gx) {
    of_grad[i] = scale[i];
    of_x[i] = (float)(-of_gx * rstd[i] * rstd[i]), constant[i] = (float)(-of_g * rstd[i]);
  }
  void at(ChannelNorm& a, int64_t i) const {
    a.mean = mean.data() + i, a.scale = scale.data() + i, a.shift = shift.data() + i;
    if (rstd.empty()) return;
    a.rstd = rstd.data() + i;
    a.of_grad = of_grad.data() + i, a.of_x = of_x.data() + i, a.constant = constant.data() + i;
  }
};

// Results of all planes or rows, where the moments are known. Channels are those of an image where `images`, else of
// all images.
void all_results(const Shape& shape, const ChannelNorm& a, const Channels& channels, bool images, bool backward) {
  int64_t bytes = size_of(shape.type) * (backward ? 4 : 2);
  if (shape.rows) {
    auto kernel = backward ? layer_table().norm_rows_bwd : layer_table().norm_rows;
    parallel_rows(shape.n * shape.s, shape.c * bytes, [&](int64_t begin, int64_t end) {
      ChannelNorm part = a;
      while (begin < end) {
        int64_t image = begin / shape.s, last = images ? std::min(end, (image + 1) * shape.s) : end;
        channels.at(part, images ? image * shape.c : 0);
        kernel(part, begin, last);
        begin = last;
      }
    });
    return;
  }
  auto kernel = backward ? layer_table().norm_run_bwd : layer_table().norm_run;
  parallel_rows(shape.n * shape.c, shape.s * bytes, [&](int64_t begin, int64_t end) {
    ChannelNorm part = a;
    for (int64_t i = begin; i < end; ++i) {
      channels.at(part, images ? i : i % shape.c);
      kernel(part, shape.plane(i), shape.plane(i + 1));
    }
  });
}

// f(i) for tasks of so many bytes each, on the caller's thread where all are small.
template <class F>
void tasks(int64_t count, int64_t bytes, const F& f) {
  parallel_rows(count, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

float rstd_of(double variance, double eps) { return (float)(1.0 / std::sqrt(variance + eps)); }

Tensor sums_over(const std::vector<double>& sums, int64_t images, int64_t c, int64_t at, const MaybeTensor& like,
                 const Tensor& x) {
  if (!like) return none(x);
  Tensor total = empty_1d(c);
  float* to = (float*)total.mutable_data_ptr();
  for (int64_t j = 0; j < c; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < images; ++i) sum += sums[(i * 2 + at) * c + j];
    to[j] = (float)sum;
  }
  return like->scalar_type() == ScalarType::Float ? total : torch::stable::to(total, like->scalar_type());
}

// ---- GroupNorm ------------------------------------------------------------------------------------------------------

int64_t check_groups(const Shape& shape, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && shape.c % groups == 0, "bigkernels::group_norm: ", shape.c,
                  " channels do not make groups of one size, ", groups, " of them");
  return shape.c / groups;
}

std::tuple<Tensor, Tensor, Tensor> group_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, int64_t groups,
                                                 double eps, int64_t activation, bool rows) {
  constexpr const char* kOp = "group_norm";
  Shape shape(kOp, x, rows);
  int64_t size = check_groups(shape, groups), sizes[2] = {shape.n, groups}, strides[2] = {groups, 1};
  ChannelNorm a = arguments(kOp, shape, x, activation);
  VectorView w(kOp, "weight", weight, shape.c), b(kOp, "bias", bias, shape.c);
  Tensor out = shape.empty(x);
  Tensor mean = empty_strided(sizes, strides, 2, ScalarType::Float, shape.n * groups * 4);
  Tensor rstd = empty_strided(sizes, strides, 2, ScalarType::Float, shape.n * groups * 4);
  if (x.numel() == 0) return {out, torch::stable::zero_(mean), torch::stable::zero_(rstd)};
  a.out = out.mutable_data_ptr();
  a.stream = streams(shape, a.out);
  float *means = (float*)mean.mutable_data_ptr(), *rstds = (float*)rstd.mutable_data_ptr();
  Channels channels(shape.n * shape.c, false);
  auto known = [&](int64_t i, const Moments& m) {  // of group i, over all images
    means[i] = (float)m.mean, rstds[i] = rstd_of(m.variance, eps);
    for (int64_t j = 0; j < size; ++j) {
      int64_t c = i % groups * size + j;
      channels.forward(i / groups * shape.c + c, means[i], rstds[i], w.data(), b.data(), c);
    }
  };
  if (rows) {
    std::vector<float> guess;
    std::vector<double> sums = column_moments(shape, a, shape.n, shape.s, guess);
    double count = (double)shape.s;
    for (int64_t i = 0; i < shape.n * groups; ++i) {
      int64_t image = i / groups, from = i % groups * size;
      auto column = [&](int64_t j, int which) { return sums[(image * 2 + which) * shape.c + from + j]; };
      const float* about = guess.data() + image * shape.c + from;
      Moments m{0, 0};
      for (int64_t j = 0; j < size; ++j) m.mean += (count * about[j] + column(j, 0)) / (count * size);
      for (int64_t j = 0; j < size; ++j) {
        double left = about[j] - m.mean;
        m.variance += (column(j, 1) + 2 * left * column(j, 0) + count * left * left) / (count * size);
      }
      m.variance = std::max(m.variance, 0.0);
      known(i, m);
    }
    all_results(shape, a, channels, true, false);
    return {out, mean, rstd};
  }
  tasks(shape.n * groups, 2 * size * shape.s * size_of(shape.type), [&](int64_t i) {
    known(i, moments_of_runs(a, 1, size * shape.s, [&](int64_t) { return shape.plane(i * size); }));
    ChannelNorm part = a;
    for (int64_t p = i * size; p < (i + 1) * size; ++p) {
      channels.at(part, p);
      layer_table().norm_run(part, shape.plane(p), shape.plane(p + 1));
    }
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_backward(Tensor grad, Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                  Tensor mean, Tensor rstd, int64_t activation, bool rows) {
  constexpr const char* kOp = "group_norm";
  Shape shape(kOp, x, rows);
  check_other(kOp, "grad", grad, x, rows);
  check_cpu(kOp, "mean", mean);
  STD_TORCH_CHECK(mean.dim() == 2, "bigkernels::group_norm: mean must be (N, groups)");
  int64_t groups = mean.size(1), size = check_groups(shape, groups);
  for (const Tensor* t : {&mean, &rstd}) {
    check_made(kOp, "mean or rstd", *t, ScalarType::Float, {shape.n, groups});
    STD_TORCH_CHECK(t->is_contiguous(), "bigkernels::group_norm: mean and rstd must be contiguous");
  }
  ChannelNorm a = arguments(kOp, shape, x, activation);
  VectorView w(kOp, "weight", weight, shape.c), b(kOp, "bias", bias, shape.c);
  Tensor dx = shape.empty(x);
  int64_t images = x.numel() ? shape.n : 0;
  std::vector<double> sums(images * 2 * shape.c);  // (images, 2, c): of g, and of g * (x - mean) * rstd
  auto result = [&] {
    return std::make_tuple(dx, sums_over(sums, images, shape.c, 1, weight, x),
                           sums_over(sums, images, shape.c, 0, bias, x));
  };
  if (!images) return result();
  a.grad = grad.const_data_ptr(), a.out = dx.mutable_data_ptr();
  a.stream = streams(shape, a.out);
  Channels channels(shape.n * shape.c, true);
  const float *means = (const float*)mean.const_data_ptr(), *rstds = (const float*)rstd.const_data_ptr();
  for (int64_t i = 0; i < shape.n * shape.c; ++i)
    channels.forward(i, means[i / size], rstds[i / size], w.data(), b.data(), i % shape.c);
  auto known = [&](int64_t i) {
    double of_g = 0, of_gx = 0, count = (double)size * shape.s;
    int64_t image = i / groups, from = i % groups * size;
    for (int64_t c = from; c < from + size; ++c) {
      double factor = w.data() ? w.data()[c] : 1.0;
      of_g += factor * sums[image * 2 * shape.c + c] / count;
      of_gx += factor * sums[(image * 2 + 1) * shape.c + c] / count;
    }
    for (int64_t c = from; c < from + size; ++c) channels.backward(image * shape.c + c, of_g, of_gx);
  };
  if (rows) {
    sums =
        column_sums(shape, shape.n, shape.s, 2, [&](int64_t s, int64_t begin, int64_t end, float* recent, double* to) {
          ChannelNorm part = a;
          channels.at(part, s * shape.c);
          layer_table().norm_rows_bwd_sums(part, begin, end, recent, to);
        });
    for (int64_t i = 0; i < shape.n * groups; ++i) known(i);
    all_results(shape, a, channels, true, true);
    return result();
  }
  tasks(shape.n * groups, 3 * size * shape.s * size_of(shape.type), [&](int64_t i) {
    ChannelNorm part = a;
    for (int64_t p = i * size; p < (i + 1) * size; ++p) {
      double both[2] = {0, 0};
      channels.at(part, p);
      layer_table().norm_run_bwd_sums(part, shape.plane(p), shape.plane(p + 1), both);
      int64_t at = p / shape.c * 2 * shape.c + p % shape.c;
      sums[at] = both[0], sums[at + shape.c] = both[1];
    }
    known(i);
    for (int64_t p = i * size; p < (i + 1) * size; ++p) {
      channels.at(part, p);
      layer_table().norm_run_bwd(part, shape.plane(p), shape.plane(p + 1));
    }
  });
  return result();
}

// ---- BatchNorm ------------------------------------------------------------------------------------------------------

// Given moments are those of evaluation.
std::tuple<Tensor, Tensor, Tensor> batch_forward(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual,
                                                 MaybeTensor mean, MaybeTensor variance, double eps, int64_t activation,
                                                 bool rows) {
  constexpr const char* kOp = "batch_norm";
  Shape shape(kOp, x, rows);
  ChannelNorm a = arguments(kOp, shape, x, activation);
  VectorView w(kOp, "weight", weight, shape.c), b(kOp, "bias", bias, shape.c);
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(), "bigkernels::batch_norm: mean and variance go together");
  if (residual) check_other(kOp, "residual", *residual, x, rows);
  Tensor out = shape.empty(x);
  Channels channels(shape.c, false);
  a.out = out.mutable_data_ptr();
  a.residual = residual ? residual->const_data_ptr() : nullptr;
  a.stream = streams(shape, a.out);
  if (mean) {
    VectorView m(kOp, "mean", mean, shape.c), v(kOp, "variance", variance, shape.c);
    for (int64_t c = 0; c < shape.c; ++c)
      channels.forward(c, m.data()[c], rstd_of(v.data()[c], eps), w.data(), b.data(), c);
    if (x.numel()) all_results(shape, a, channels, false, false);
    return {out, none(x), none(x)};
  }
  Tensor means = empty_1d(shape.c), variances = empty_1d(shape.c);
  if (x.numel() == 0) return {out, torch::stable::zero_(means), torch::stable::zero_(variances)};
  float *to_mean = (float*)means.mutable_data_ptr(), *to_variance = (float*)variances.mutable_data_ptr();
  auto known = [&](int64_t c, const Moments& m) {
    to_mean[c] = (float)m.mean, to_variance[c] = (float)m.variance;
    channels.forward(c, to_mean[c], rstd_of(to_variance[c], eps), w.data(), b.data(), c);
  };
  if (rows) {
    std::vector<float> guess;
    std::vector<double> sums = column_moments(shape, a, 1, shape.n * shape.s, guess);
    for (int64_t c = 0; c < shape.c; ++c) {
      const double both[2] = {sums[c], sums[shape.c + c]};
      known(c, moments_of(guess[c], both, (double)shape.n * shape.s));
    }
    all_results(shape, a, channels, false, false);
    return {out, means, variances};
  }
  tasks(shape.c, 2 * shape.n * shape.s * size_of(shape.type), [&](int64_t c) {
    auto begin = [&](int64_t i) { return shape.plane(i * shape.c + c); };
    known(c, moments_of_runs(a, shape.n, shape.s, begin));
    ChannelNorm part = a;
    channels.at(part, c);
    for (int64_t i = 0; i < shape.n; ++i) layer_table().norm_run(part, begin(i), begin(i) + shape.s);
  });
  return {out, means, variances};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_backward(Tensor grad, Tensor x, MaybeTensor weight, MaybeTensor bias,
                                                          MaybeTensor result, Tensor mean, Tensor variance, double eps,
                                                          int64_t activation, bool rows, bool training, bool residual) {
  constexpr const char* kOp = "batch_norm";
  Shape shape(kOp, x, rows);
  check_other(kOp, "grad", grad, x, rows);
  if (result) check_other(kOp, "result", *result, x, rows);
  STD_TORCH_CHECK(!residual || result || activation == (int64_t)Activation::identity,
                  "bigkernels::batch_norm: behind a residual the slope of the ", "activation is read from the result");
  ChannelNorm a = arguments(kOp, shape, x, activation);
  VectorView w(kOp, "weight", weight, shape.c), b(kOp, "bias", bias, shape.c);
  VectorView m(kOp, "mean", mean, shape.c), v(kOp, "variance", variance, shape.c);
  Tensor dx = shape.empty(x), of_residual = residual ? shape.empty(x) : none(x);
  bool any = x.numel() > 0;
  std::vector<double> sums(2 * shape.c);
  auto results = [&] {
    return std::make_tuple(dx, sums_over(sums, 1, shape.c, 1, weight, x), sums_over(sums, 1, shape.c, 0, bias, x),
                           of_residual);
  };
  if (!any) return results();
  a.grad = grad.const_data_ptr(), a.out = dx.mutable_data_ptr();
  a.result = result ? result->const_data_ptr() : nullptr;
  a.out_residual = residual ? of_residual.mutable_data_ptr() : nullptr;
  a.stream = streams(shape, a.out) && streams(shape, a.out_residual);
  Channels channels(shape.c, true);
  for (int64_t c = 0; c < shape.c; ++c)
    channels.forward(c, m.data()[c], rstd_of(v.data()[c], eps), w.data(), b.data(), c);
  double count = (double)shape.n * shape.s;
  auto known = [&](int64_t c) {
    double factor = training ? (w.data() ? w.data()[c] : 1.0) / count : 0.0;
    channels.backward(c, factor * sums[c], factor * sums[shape.c + c]);
  };
  if (rows) {
    sums = column_sums(shape, 1, shape.n * shape.s, 2,
                       [&](int64_t, int64_t begin, int64_t end, float* recent, double* to) {
                         ChannelNorm part = a;
                         channels.at(part, 0);
                         layer_table().norm_rows_bwd_sums(part, begin, end, recent, to);
                       });
    for (int64_t c = 0; c < shape.c; ++c) known(c);
    all_results(shape, a, channels, false, true);
    return results();
  }
  tasks(shape.c, 3 * shape.n * shape.s * size_of(shape.type), [&](int64_t c) {
    auto begin = [&](int64_t i) { return shape.plane(i * shape.c + c); };
    ChannelNorm part = a;
    double both[2] = {0, 0};
    channels.at(part, c);
    for (int64_t i = 0; i < shape.n; ++i) layer_table().norm_run_bwd_sums(part, begin(i), begin(i) + shape.s, both);
    sums[c] = both[0], sums[shape.c + c] = both[1];
    known(c);
    for (int64_t i = 0; i < shape.n; ++i) layer_table().norm_run_bwd(part, begin(i), begin(i) + shape.s);
  });
  return results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&group_forward));
  m.impl("group_norm_bwd", TORCH_BOX(&group_backward));
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_forward));
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_backward));
}

}  // namespace bigkernels
