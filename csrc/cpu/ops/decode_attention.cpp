// Decode attention: the arguments as the kernels take them, and the division of the keys among the threads.
#include <bigkernels/stable.h>

#include <algorithm>

namespace bigkernels {
namespace {

constexpr int64_t kBlock = 64;             // keys: where a sequence may be cut
constexpr int64_t kRowsAtOnce = 128;       // that share one pass over the keys of a head
constexpr int64_t kStateFloats = 1 << 16;  // sums that stay in the second-level cache beside the keys

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Parts in the order of sequences, queries, heads and keys, cut into one run a thread of about as many keys each. Runs
// end within a sequence where they have to: a part of one is merged with its neighbours.
struct Plan {
  std::vector<DecodePart> parts;
  std::vector<int64_t> runs;    // where the parts of each thread begin, and the end
  std::vector<int64_t> merges;  // pairs (first, end) of parts of the same rows
  int64_t groups = 1, queries = 1;

  explicit Plan(const DecodeAttention& a) {
    int64_t group_size = a.heads / a.groups;
    queries = std::clamp<int64_t>(kRowsAtOnce / group_size, 1, std::max<int64_t>(a.queries, 1));
    // Heads that lie inside of tokens are taken together: their memory is read in the order of its addresses.
    if (a.k.head < a.k.token) groups = std::clamp<int64_t>(kStateFloats / (queries * group_size * a.dv), 1, a.groups);
    for (int64_t b = 0; b < a.batches; ++b)
      for (int64_t i = 0; i < a.queries; i += queries) {
        int64_t n = std::min(queries, a.queries - i);
        auto [begin, end] = seen(a, b, i, i + n);
        for (int64_t g = 0; g < a.groups; g += groups)
          parts.push_back({b, g, std::min(groups, a.groups - g), i, n, begin, end, nullptr});
      }
    cut(a);
  }

 private:
  static std::pair<int64_t, int64_t> seen(const DecodeAttention& a, int64_t batch, int64_t first, int64_t last) {
    int64_t keys = a.lengths ? a.lengths[batch] : a.keys, offset = keys - a.queries;
    int64_t prefix = a.prefix ? std::min<int64_t>(a.prefix[batch], keys) : 0;
    int64_t begin = a.left < 0 || prefix > 0 ? 0 : std::max<int64_t>(first + offset - a.left, 0);
    int64_t end = a.right < 0 ? keys : std::clamp<int64_t>(last + offset + a.right, prefix, keys);
    return {std::min(begin, end), end};
  }

  void cut(const DecodeAttention& a) {
    std::vector<DecodePart> whole;
    whole.swap(parts);
    int64_t total = 0;
    for (const DecodePart& p : whole) total += (p.end - p.begin) * p.groups;
    int64_t bytes = total * (a.d + a.dv) * (a.int8 ? 1 : size_of(a.type));
    int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), kDecodeParts);
    threads = std::clamp<int64_t>(bytes / grain_bytes(), 1, threads);
    int64_t done = 0, thread = 1;
    runs.push_back(0);
    for (DecodePart p : whole) {
      int64_t end = p.end, first = parts.size();
      while (thread < threads) {
        int64_t cut = (total * thread / threads - done) / p.groups;  // keys of this part before the run ends
        cut = p.begin + (cut + kBlock / 2) / kBlock * kBlock;
        if (cut >= end) break;
        if (cut > p.begin) {
          p.end = cut;
          parts.push_back(p);
          done += (p.end - p.begin) * p.groups;
          p.begin = cut;
        }
        runs.push_back(parts.size());
        ++thread;
      }
      p.end = end;
      parts.push_back(p);
      done += (p.end - p.begin) * p.groups;
      int64_t last = parts.size();
      if (last - first > 1) merges.insert(merges.end(), {first, last});
    }
    runs.push_back(parts.size());
  }
};

}  // namespace

void decode_attention(const DecodeAttention& a) {
  if (a.batches == 0 || a.heads == 0 || a.queries == 0) return;
  Plan plan(a);
  const CpuTable& kernels = table();
  DecodeSizes sizes = kernels.decode_sizes(a, plan.groups, plan.queries);
  int64_t threads = plan.runs.size() - 1, workspace = padded(sizes.workspace), state = padded(sizes.state * 4);
  int64_t states = 0;
  for (size_t i = 0; i < plan.merges.size(); i += 2) states += plan.merges[i + 1] - plan.merges[i];
  Scratch memory(threads * workspace + states * state);
  char* next = memory.data() + threads * workspace;
  for (size_t i = 0; i < plan.merges.size(); i += 2)
    for (int64_t j = plan.merges[i]; j < plan.merges[i + 1]; ++j, next += state) plan.parts[j].state = (float*)next;
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels.decode_attention(a, plan.parts.data() + plan.runs[t], plan.runs[t + 1] - plan.runs[t],
                               memory.data() + t * workspace);
  };
  if (threads == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
  for (size_t i = 0; i < plan.merges.size(); i += 2)
    kernels.decode_merge(a, plan.parts.data() + plan.merges[i], plan.merges[i + 1] - plan.merges[i], 0,
                         plan.parts[plan.merges[i]].queries);
}

namespace {

Attention::Heads queries_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}
// (batch or page, token, head), of values or scales
Attention::Heads cache_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

// A cache as the kernels read it: the arguments it sets, and what keeps them alive.
class CacheView {
 public:
  Tensor k, v;

  // Fills all but q, out and the options of `a`.
  CacheView(const char* op, DecodeAttention& a, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
            const Tensor& cache_seqlens, const MaybeTensor& block_table, const MaybeTensor& k_scale,
            const MaybeTensor& v_scale, int64_t left)
      : op_(op) {
    check_cpu(op, "q", q);
    check_cpu(op, "k_cache", k_cache);
    check_cpu(op, "v_cache", v_cache);
    STD_TORCH_CHECK(q.dim() == 4 && k_cache.dim() == 4 && v_cache.dim() == 4, "bigkernels::", op,
                    ": q and the caches must have four dimensions");
    a.type = type_of(q);
    a.batches = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.d = q.size(3);
    a.groups = k_cache.size(2), a.dv = v_cache.size(3);
    a.int8 = k_cache.scalar_type() == ScalarType::Char;
    STD_TORCH_CHECK((a.int8 || k_cache.scalar_type() == q.scalar_type()) &&
                        v_cache.scalar_type() == k_cache.scalar_type() && a.int8 == k_scale.has_value() &&
                        a.int8 == v_scale.has_value(),
                    "bigkernels::", op, ": the dtypes of q, the caches and their scales do not fit");
    STD_TORCH_CHECK(k_cache.size(3) == a.d && v_cache.size(0) == k_cache.size(0) &&
                        v_cache.size(1) == k_cache.size(1) && v_cache.size(2) == a.groups && a.groups > 0 &&
                        a.heads % a.groups == 0 && a.d > 0 && a.dv > 0 && (block_table || k_cache.size(0) == a.batches),
                    "bigkernels::", op, ": the shapes of q and the caches do not fit");
    lengths_ = torch::stable::contiguous(cache_seqlens);
    a.lengths = integers("cache_seqlens", lengths_, 1, a.batches);
    int64_t capacity = k_cache.size(1);
    if (block_table) {
      table_ = last_contiguous(*block_table);
      a.block_table = integers("block_table", table_, 2, a.batches);
      a.table_stride = table_.stride(0);
      a.page = capacity;
      STD_TORCH_CHECK(a.page > 0, "bigkernels::", op, ": the pages hold no tokens");
      capacity *= table_.size(1);
    }
    check_lengths(a, k_cache.size(0), capacity, left);
    k = last_contiguous(k_cache), v = last_contiguous(v_cache);
    a.k = cache_of(k), a.v = cache_of(v);
    if (!a.int8) return;
    for (const MaybeTensor& s : {k_scale, v_scale}) {
      check_cpu(op, "k_scale and v_scale", *s);
      STD_TORCH_CHECK(s->scalar_type() == ScalarType::Float && s->dim() == 3 && s->size(0) == k_cache.size(0) &&
                          s->size(1) == k_cache.size(1) && s->size(2) == a.groups,
                      "bigkernels::", op, ": scales must be float32, one a head of a token");
    }
    a.k_scale = cache_of(*k_scale), a.v_scale = cache_of(*v_scale);
  }

 private:
  const int32_t* integers(const char* name, const Tensor& t, int64_t dim, int64_t first) {
    check_cpu(op_, name, t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == dim && t.size(0) == first, "bigkernels::", op_,
                    ": ", name, " must be int32, with one entry a sequence");
    return (const int32_t*)t.const_data_ptr();
  }

  // The lengths and the pages that the keys [oldest, length) of each sequence lie on.
  void check_lengths(const DecodeAttention& a, int64_t pages, int64_t capacity, int64_t left) {
    for (int64_t b = 0; b < a.batches; ++b) {
      int64_t length = a.lengths[b];
      STD_TORCH_CHECK(length == 0 || (length >= a.queries && length >= 0 && length <= capacity), "bigkernels::", op_,
                      ": a length is ", length, ", and the capacity ", capacity);
      if (!a.block_table || length == 0) continue;
      int64_t oldest = left < 0 ? 0 : std::max<int64_t>(0, length - a.queries - left);
      for (int64_t i = oldest / a.page; i <= (length - 1) / a.page; ++i) {
        int64_t page = a.block_table[b * a.table_stride + i];
        STD_TORCH_CHECK(page >= 0 && page < pages, "bigkernels::", op_, ": ", page, " is not one of ", pages, " pages");
      }
    }
  }

  const char* op_;
  Tensor lengths_, table_;
};

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                  MaybeTensor block_table, MaybeTensor k_scale, MaybeTensor v_scale,
                                  MaybeTensor alibi_slopes, MaybeTensor sink_logits, int64_t left, double scale,
                                  double softcap) {
  constexpr const char* op = "decode_attention";
  left = window_end(left);
  DecodeAttention a{};
  CacheView cache(op, a, q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, left);
  STD_TORCH_CHECK(usable_softcap(softcap), "bigkernels::", op, ": softcap is out of range");
  VectorView alibi(op, "alibi_slopes", alibi_slopes, a.heads), sinks(op, "sinks", sink_logits, a.heads);
  q = last_contiguous(q);
  a.q = queries_of(q);
  Tensor out = empty_heads(q, a.dv), lse = empty_like_leading(q, 3, ScalarType::Float);
  a.out = queries_of(out);
  a.lse = (float*)lse.mutable_data_ptr(), a.lse_batch = lse.stride(0), a.lse_head = lse.stride(1);
  a.alibi = alibi.data(), a.sinks = sinks.data();
  a.left = left, a.right = 0;
  a.scale = (float)scale, a.softcap = (float)softcap;
  decode_attention(a);
  return {out, lse};
}

void check_new(const char* name, const Tensor& x, const Tensor& q, int64_t groups, int64_t size) {
  check_cpu("append_kv_", name, x);
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == groups &&
                      x.size(2) == q.size(2) && x.size(3) == size,
                  "bigkernels::append_kv_: ", name,
                  " must be the new tokens in the cache's heads, and of the dtype of q");
}

Tensor append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
              MaybeTensor block_table, MaybeTensor cos, MaybeTensor sin, MaybeTensor k_scale, MaybeTensor v_scale,
              bool interleaved) {
  constexpr const char* op = "append_kv_";
  for (const MaybeTensor& t : {MaybeTensor(k_cache), MaybeTensor(v_cache), k_scale, v_scale})
    if (t) t->mutable_data_ptr();  // a lazy copy becomes one of its own
  AppendKv a{};
  CacheView cache(op, a, q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, -1);
  for (const Tensor* t : {&k_cache, &v_cache})
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(t->stride(i) != 0 || t->size(i) <= 1, "bigkernels::", op,
                      ": a cache that is written may not be expanded: its elements share memory");
  check_new("k", k, q, a.groups, a.d);
  check_new("v", v, q, a.groups, a.dv);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "bigkernels::", op, ": cos and sin are given together");
  AngleView angles(op, cos, sin, q, interleaved);
  a.angles = angles.angles;
  q = last_contiguous(q), k = last_contiguous(k), v = last_contiguous(v);
  Tensor out = empty_dense_like(q);
  a.q = queries_of(q), a.out = queries_of(out), a.new_k = queries_of(k), a.new_v = queries_of(v);
  auto kernel = table().append_kv;
  parallel_rows(a.batches * a.queries, (2 * a.heads * a.d + 2 * a.groups * (a.d + a.dv)) * size_of(a.type),
                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  // A cache whose heads are not contiguous was written in a copy.
  if (cache.k.const_data_ptr() != k_cache.const_data_ptr()) torch::stable::copy_(k_cache, cache.k);
  if (cache.v.const_data_ptr() != v_cache.const_data_ptr()) torch::stable::copy_(v_cache, cache.v);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode));
  m.impl("append_kv_", TORCH_BOX(&append));
}

}  // namespace bigkernels
