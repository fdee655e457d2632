// codeact._native: checks, arrays in and out, and the GIL. The work is in files that know nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attention/attention.hpp"
#include "clustering/kmeans.hpp"
#include "layers/layers.hpp"
#include "nll/linear_nll.hpp"
#include "nll/loss_slope.hpp"
#include "packing/packing.hpp"
#include "simd/instruction_sets.hpp"

namespace py = pybind11;

namespace {

// A numpy array that owns the vector: no copy.
template <class T>
py::array_t<T> as_array(codeact::LargeArray<T>&& values) {
  using Values = codeact::LargeArray<T>;
  auto owner = std::make_unique<Values>(std::move(values));
  const py::capsule free_owner(owner.get(), [](void* vector) { delete static_cast<Values*>(vector); });
  const Values* vector = owner.release();  // the capsule has it now
  return py::array_t<T>(static_cast<py::ssize_t>(vector->size()), vector->data(), free_owner);
}

codeact::IntegerView integer_view(const py::array& array, const char* name) {
  const py::dtype dtype = array.dtype();
  if ((dtype.kind() != 'i' && dtype.kind() != 'u') || dtype.byteorder() == '>')
    throw py::type_error(std::string(name) + " must hold integers in native byte order, not " +
                         py::str(dtype).cast<std::string>());
  if (array.ndim() != 1)
    throw py::value_error(std::string(name) + " must have one dimension, not " + std::to_string(array.ndim()));
  return {.data = static_cast<const std::byte*>(array.data()),
          .size = array.shape(0),
          .stride = array.strides(0),
          .item_bytes = static_cast<std::uint8_t>(dtype.itemsize()),
          .is_signed = dtype.kind() == 'i'};
}

codeact::Algorithm algorithm_of(const std::string& name) {
  if (name == "bfd") return codeact::Algorithm::best_fit_decreasing;
  if (name == "ffd") return codeact::Algorithm::first_fit_decreasing;
  if (name == "next_fit") return codeact::Algorithm::next_fit;
  throw py::value_error("unknown algorithm '" + name + "'");
}

py::tuple pack(const py::array& lengths, std::int64_t capacity, const std::string& algorithm_name,
               std::optional<std::int64_t> max_items) {
  const codeact::IntegerView view = integer_view(lengths, "lengths");
  const codeact::Algorithm algorithm = algorithm_of(algorithm_name);
  if (capacity < 1 || capacity > codeact::kMaxCapacity)
    throw py::value_error("capacity is " + std::to_string(capacity) + "; it must be in 1.." +
                          std::to_string(codeact::kMaxCapacity));
  if (max_items && *max_items < 1)
    throw py::value_error("max_items is " + std::to_string(*max_items) + "; it must be at least 1, or None");
  if (view.size > codeact::kMaxItems)
    throw py::value_error("lengths holds " + std::to_string(view.size) + " items; at most " +
                          std::to_string(codeact::kMaxItems) + " can be packed at once");
  const auto item_limit = static_cast<std::uint32_t>(
      std::min<std::int64_t>(max_items.value_or(codeact::kNoItemLimit), codeact::kNoItemLimit));

  py::array_t<std::int64_t> indices(view.size);
  std::int64_t* index_data = indices.mutable_data();
  codeact::PackPlan plan;
  {
    const py::gil_scoped_release released;
    // The lengths are copied to where the indices will be: half of that memory, and needed only before.
    auto* copy = reinterpret_cast<std::uint32_t*>(index_data);
    const codeact::CheckedLengths checked = codeact::check_lengths(view, static_cast<std::uint32_t>(capacity), copy);
    plan = codeact::plan_packs(checked, static_cast<std::uint32_t>(capacity), algorithm, item_limit, index_data);
  }
  return py::make_tuple(std::move(indices), as_array(std::move(plan.offsets)), plan.tokens, plan.lower_bound);
}

codeact::MatrixView matrix_view(const py::array& array, const char* name) {
  if (array.ndim() != 2) throw py::value_error(std::string(name) + " must have two dimensions");
  if (array.shape(0) > 0 && array.shape(1) > 1 && array.strides(1) != array.itemsize())
    throw py::value_error(std::string(name) + " must have its elements side by side in a row");
  return {.data = static_cast<const std::byte*>(array.data()),
          .rows = array.shape(0),
          .columns = array.shape(1),
          .row_stride = array.strides(0)};
}

// Of arrays of one dtype: float32, or uint16 that holds bfloat16, which numpy does not know.
codeact::Element element_of(std::initializer_list<const py::array*> arrays) {
  const py::dtype dtype = (*arrays.begin())->dtype();
  const bool half = dtype.is(py::dtype::of<std::uint16_t>());
  bool fits = half || dtype.is(py::dtype::of<float>());
  for (const py::array* array : arrays) fits = fits && array->dtype().is(dtype);
  if (!fits) throw py::type_error("operands must all be float32, or all uint16 that holds bfloat16");
  return half ? codeact::Element::bfloat16 : codeact::Element::float32;
}

py::array_t<float> linear_nll(const py::array& hidden, const py::array& weight,
                              const py::array_t<std::int64_t, py::array::c_style>& targets,
                              const std::optional<py::array_t<float, py::array::c_style>>& bias,
                              std::optional<float> softcap, std::int64_t ignore_index, int threads,
                              const std::string& instruction_set) {
  codeact::LinearNll problem{.element = element_of({&hidden, &weight}),
                             .hidden = matrix_view(hidden, "hidden"),
                             .weight = matrix_view(weight, "weight"),
                             .targets = targets.data(),
                             .bias = bias ? bias->data() : nullptr,
                             .softcap = softcap,
                             .ignore_index = ignore_index,
                             .losses = nullptr};
  if (problem.hidden.columns != problem.weight.columns) throw py::value_error("hidden and weight differ in width");
  if (targets.ndim() != 1 || targets.shape(0) != problem.hidden.rows)
    throw py::value_error("targets must hold one value a row of hidden");
  if (bias && (bias->ndim() != 1 || bias->shape(0) != problem.weight.rows))
    throw py::value_error("bias must hold one value a row of weight");
  py::array_t<float> losses(problem.hidden.rows);
  problem.losses = losses.mutable_data();
  {
    const py::gil_scoped_release released;
    codeact::linear_nll(problem, threads, instruction_set);
  }
  return losses;
}

py::array_t<float> loss_and_slope(py::array& logits, const py::array_t<std::int64_t, py::array::c_style>& targets,
                                  const std::optional<py::array_t<float, py::array::c_style>>& bias,
                                  std::optional<float> softcap, std::int64_t ignore_index,
                                  const std::optional<py::array_t<float, py::array::c_style>>& scale, bool slope,
                                  int threads, const std::string& instruction_set) {
  const codeact::MatrixView view = matrix_view(logits, "logits");
  py::array_t<float> losses(view.rows);
  if (targets.ndim() != 1 || targets.shape(0) != view.rows)
    throw py::value_error("targets must hold one value a row of logits");
  if (bias && (bias->ndim() != 1 || bias->shape(0) != view.columns))
    throw py::value_error("bias must hold one value a column of logits");
  if (scale && (scale->ndim() != 1 || scale->shape(0) != view.rows))
    throw py::value_error("scale must hold one value a row of logits");
  const codeact::LossSlope problem{.element = element_of({&logits}),
                                   .logits = static_cast<std::byte*>(logits.mutable_data()),
                                   .rows = view.rows,
                                   .columns = view.columns,
                                   .row_stride = view.row_stride,
                                   .targets = targets.data(),
                                   .bias = bias ? bias->data() : nullptr,
                                   .softcap = softcap,
                                   .ignore_index = ignore_index,
                                   .scale = scale ? scale->data() : nullptr,
                                   .slope = slope,
                                   .losses = losses.mutable_data()};
  {
    const py::gil_scoped_release released;
    codeact::loss_and_slope(problem, threads, instruction_set);
  }
  return losses;
}

codeact::HeadsView heads_view(const py::array& array, const char* name) {
  if (array.ndim() != 3) throw py::value_error(std::string(name) + " must have three dimensions");
  if (array.size() > 0 && array.shape(2) > 1 && array.strides(2) != array.itemsize())
    throw py::value_error(std::string(name) + " must have the elements of a head side by side");
  return {.data = static_cast<const std::byte*>(array.data()),
          .heads = array.shape(0),
          .tokens = array.shape(1),
          .width = array.shape(2),
          .head_stride = array.strides(0),
          .token_stride = array.strides(1)};
}

using Bounds = py::array_t<std::int32_t, py::array::c_style>;

std::span<const std::int32_t> span_of(const std::optional<Bounds>& array) {
  if (!array) return {};
  return {array->data(), static_cast<std::size_t>(array->size())};
}

codeact::AttentionOperands attention_operands(const py::array& query, const py::array& key, const py::array& value,
                                              const Bounds& cu_seqlens, float scale,
                                              const std::optional<Bounds>& prefixes = {}) {
  const codeact::AttentionOperands operands{.element = element_of({&query, &key, &value}),
                                            .queries = heads_view(query, "query"),
                                            .keys = heads_view(key, "key"),
                                            .values = heads_view(value, "value"),
                                            .bounds = {cu_seqlens.data(), static_cast<std::size_t>(cu_seqlens.size())},
                                            .scale = scale,
                                            .prefixes = span_of(prefixes)};
  const auto& [element, queries, keys, values, bounds, factor, others] = operands;
  if (queries.tokens != keys.tokens || queries.tokens != values.tokens || queries.width != keys.width ||
      keys.heads != values.heads || keys.heads == 0 || queries.heads % keys.heads != 0)
    throw py::value_error("query, key and value do not fit together");
  if (!(scale > 0)) throw py::value_error("scale must be above 0");
  return operands;
}

// Of the dtype of `like`: (tokens, heads, width).
py::array new_heads(const py::array& like, std::int64_t tokens, std::int64_t heads, std::int64_t width) {
  return py::array(like.dtype(), std::vector<py::ssize_t>{tokens, heads, width});
}

std::byte* bytes_of(py::array& array) { return static_cast<std::byte*>(array.mutable_data()); }

py::array varlen_attention(const py::array& query, const py::array& key, const py::array& value,
                           const Bounds& cu_seqlens, float scale, int threads, const std::string& instruction_set,
                           const std::optional<Bounds>& prefixes) {
  const codeact::AttentionOperands operands = attention_operands(query, key, value, cu_seqlens, scale, prefixes);
  py::array output = new_heads(query, operands.queries.tokens, operands.queries.heads, operands.values.width);
  std::byte* data = bytes_of(output);
  {
    const py::gil_scoped_release released;
    codeact::varlen_attention(operands, data, threads, instruction_set);
  }
  return output;
}

py::tuple varlen_attention_backward(const py::array& output_gradient, const py::array& query, const py::array& key,
                                    const py::array& value, const Bounds& cu_seqlens, float scale, int threads,
                                    const std::string& instruction_set) {
  element_of({&query, &output_gradient});
  const codeact::AttentionOperands operands = attention_operands(query, key, value, cu_seqlens, scale);
  const codeact::HeadsView slopes = heads_view(output_gradient, "output_gradient");
  const auto& [element, queries, keys, values, bounds, factor, prefixes] = operands;
  if (slopes.heads != queries.heads || slopes.tokens != queries.tokens || slopes.width != values.width)
    throw py::value_error("output_gradient does not fit the operands");
  py::array query_gradient = new_heads(query, queries.tokens, queries.heads, queries.width);
  py::array key_gradient = new_heads(query, keys.tokens, keys.heads, keys.width);
  py::array value_gradient = new_heads(query, values.tokens, values.heads, values.width);
  const codeact::AttentionGradients gradients{
      .queries = bytes_of(query_gradient), .keys = bytes_of(key_gradient), .values = bytes_of(value_gradient)};
  {
    const py::gil_scoped_release released;
    codeact::varlen_attention_backward(operands, slopes, gradients, threads, instruction_set);
  }
  return py::make_tuple(std::move(query_gradient), std::move(key_gradient), std::move(value_gradient));
}

using Floats = py::array_t<float, py::array::c_style>;

py::tuple kmeans(const Floats& vectors, std::int64_t clusters,
                 const py::array_t<std::int64_t, py::array::c_style>& first,
                 const py::array_t<double, py::array::c_style>& draws, double tolerance, std::int64_t iterations,
                 int threads, const std::string& instruction_set) {
  if (vectors.ndim() != 2 || first.ndim() != 1 || draws.ndim() != 3)
    throw py::value_error("vectors must have two dimensions, first one, draws three");
  if (clusters < 1 || clusters > vectors.shape(0) || vectors.shape(1) < 1 || first.shape(0) < 1)
    throw py::value_error("there must be vectors, a run, and at most as many clusters as vectors");
  if (draws.shape(0) != first.shape(0) || draws.shape(1) != clusters - 1 || draws.shape(2) < 1)
    throw py::value_error("draws must be (runs, clusters - 1, trials)");
  const codeact::KMeans problem{.rows = vectors.data(),
                                .count = vectors.shape(0),
                                .features = vectors.shape(1),
                                .clusters = clusters,
                                .first = first.data(),
                                .draws = draws.data(),
                                .runs = first.shape(0),
                                .trials = draws.shape(2),
                                .tolerance = tolerance,
                                .iterations = iterations};
  for (std::int64_t run = 0; run < problem.runs; ++run)
    if (first.data()[run] < 0 || first.data()[run] >= problem.count)
      throw py::value_error("a run begins at a row that is not there");
  codeact::Clusters found;
  {
    const py::gil_scoped_release released;
    found = codeact::kmeans(problem, threads, instruction_set);
  }
  py::array_t<float> centres({clusters, problem.features}, found.centres.data());
  return py::make_tuple(as_array(std::move(found.labels)), std::move(centres), as_array(std::move(found.mean)),
                        found.passes);
}

py::array_t<std::int32_t> nearest_centres(const Floats& vectors, const Floats& centres, const Floats& mean, int threads,
                                          const std::string& instruction_set) {
  if (vectors.ndim() != 2 || centres.ndim() != 2 || mean.ndim() != 1 || vectors.shape(1) != mean.shape(0) ||
      centres.shape(1) != mean.shape(0) || centres.shape(0) < 1 || mean.shape(0) < 1)
    throw py::value_error("vectors, centres and mean must be (rows, D), (k, D) and (D,)");
  codeact::Clusters clusters{};
  clusters.centres.assign(centres.data(), centres.data() + centres.size());
  clusters.mean.assign(mean.data(), mean.data() + mean.size());
  py::array_t<std::int32_t> labels(vectors.shape(0));
  std::int32_t* out = labels.mutable_data();
  {
    const py::gil_scoped_release released;
    codeact::nearest_centres(vectors.data(), vectors.shape(0), clusters, out, threads, instruction_set);
  }
  return labels;
}

// Of arrays whose last dimension lies side by side; what comes before it in one step.
codeact::Rows rows_of(const py::array& array, const char* name) {
  const codeact::MatrixView view = matrix_view(array, name);
  return {.data = view.data, .rows = view.rows, .columns = view.columns, .stride = view.row_stride};
}

codeact::WritableRows writable_rows(py::array& array, const codeact::Rows& like) {
  const codeact::Rows rows = rows_of(array, "output");
  if (rows.rows != like.rows || rows.columns != like.columns) throw py::value_error("output does not fit the operands");
  return {.data = static_cast<std::byte*>(array.mutable_data()),
          .rows = rows.rows,
          .columns = rows.columns,
          .stride = rows.stride};
}

void rms_norm(const py::array& x, const py::array& weight, float epsilon, py::array& output, int threads,
              const std::string& instruction_set) {
  const codeact::Element element = element_of({&x, &weight, &output});
  const codeact::Rows rows = rows_of(x, "x");
  const codeact::WritableRows target = writable_rows(output, rows);
  if (weight.ndim() != 1 || weight.shape(0) != rows.columns || weight.strides(0) != weight.itemsize())
    throw py::value_error("weight must hold one value a column, side by side");
  const auto* scale = static_cast<const std::byte*>(weight.data());
  const py::gil_scoped_release released;
  codeact::rms_norm(rows, scale, epsilon, target, element, threads, instruction_set);
}

void silu_multiply(const py::array& gate, const py::array& up, py::array& output, int threads,
                   const std::string& instruction_set) {
  const codeact::Element element = element_of({&gate, &up, &output});
  const codeact::Rows first = rows_of(gate, "gate");
  const codeact::Rows second = rows_of(up, "up");
  const codeact::WritableRows target = writable_rows(output, first);
  if (first.rows != second.rows || first.columns != second.columns)
    throw py::value_error("gate and up differ in shape");
  const py::gil_scoped_release released;
  codeact::silu_multiply(first, second, target, element, threads, instruction_set);
}

void rotate(const py::array& x, const py::array& cosine, const py::array& sine, py::array& output, int threads,
            const std::string& instruction_set) {
  const codeact::Element element = element_of({&x, &cosine, &sine, &output});
  const codeact::Rows cos = rows_of(cosine, "cosine");
  const codeact::Rows sin = rows_of(sine, "sine");
  const auto heads = [&](const py::array& array, const char* name) {
    const codeact::HeadsView view = heads_view(array, name);
    if (view.tokens != cos.rows || view.width != cos.columns || view.tokens != sin.rows || view.width != sin.columns ||
        view.width % 2 != 0)
      throw py::value_error(std::string(name) + " must be (H, T, D) with D even, cosine and sine (T, D)");
    return view;
  };
  const codeact::HeadsView from = heads(x, "x");
  const codeact::HeadsView to = heads(output, "output");
  if (from.heads != to.heads) throw py::value_error("output does not fit the operands");
  const codeact::Rows rows{.data = from.data, .rows = from.tokens, .columns = from.width, .stride = from.token_stride};
  const codeact::WritableRows target{.data = static_cast<std::byte*>(output.mutable_data()),
                                     .rows = to.tokens,
                                     .columns = to.width,
                                     .stride = to.token_stride};
  const py::gil_scoped_release released;
  codeact::rotate(rows, {from.heads, from.head_stride}, cos, sin, target, {to.heads, to.head_stride}, element, threads,
                  instruction_set);
}

std::vector<std::string> as_strings(const std::vector<std::string_view>& names) { return {names.begin(), names.end()}; }

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() =
      "The compiled core of codeact. Use codeact.packing.packs and codeact.ops.nll, which check their arguments.";
  module.def("pack", &pack, py::arg("lengths"), py::arg("capacity"), py::arg("algorithm"), py::arg("max_items"));
  module.def("instruction_sets", [] { return as_strings(codeact::instruction_sets()); });
  module.def("compiled_instruction_sets", [] { return as_strings(codeact::compiled_instruction_sets()); });
  module.def("linear_nll", &linear_nll, py::arg("hidden"), py::arg("weight"), py::arg("targets"), py::arg("bias"),
             py::arg("softcap"), py::arg("ignore_index"), py::arg("threads"), py::arg("instruction_set"));
  module.def("loss_and_slope", &loss_and_slope, py::arg("logits"), py::arg("targets"), py::arg("bias"),
             py::arg("softcap"), py::arg("ignore_index"), py::arg("scale"), py::arg("slope"), py::arg("threads"),
             py::arg("instruction_set"));
  module.def("kmeans", &kmeans, py::arg("vectors").noconvert(), py::arg("clusters"), py::arg("first"), py::arg("draws"),
             py::arg("tolerance"), py::arg("iterations"), py::arg("threads"), py::arg("instruction_set"));
  module.def("nearest_centres", &nearest_centres, py::arg("vectors").noconvert(), py::arg("centres"), py::arg("mean"),
             py::arg("threads"), py::arg("instruction_set"));
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("epsilon"), py::arg("output"),
             py::arg("threads"), py::arg("instruction_set"));
  module.def("silu_multiply", &silu_multiply, py::arg("gate"), py::arg("up"), py::arg("output"), py::arg("threads"),
             py::arg("instruction_set"));
  module.def("rotate", &rotate, py::arg("x"), py::arg("cosine"), py::arg("sine"), py::arg("output"), py::arg("threads"),
             py::arg("instruction_set"));
  module.def("varlen_attention", &varlen_attention, py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("cu_seqlens"), py::arg("scale"), py::arg("threads"), py::arg("instruction_set"),
             py::arg("prefixes") = py::none());
  module.def("varlen_attention_backward", &varlen_attention_backward, py::arg("output_gradient"), py::arg("query"),
             py::arg("key"), py::arg("value"), py::arg("cu_seqlens"), py::arg("scale"), py::arg("threads"),
             py::arg("instruction_set"));
}
