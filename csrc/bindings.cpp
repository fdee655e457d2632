// codeact._native: checks, arrays in and out, and the GIL. The work is in packing.cpp, which knows nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "packing.hpp"

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

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled core of codeact. Use codeact.packing, which checks its arguments and documents them.";
  module.def("pack", &pack, py::arg("lengths"), py::arg("capacity"), py::arg("algorithm"), py::arg("max_items"));
}
