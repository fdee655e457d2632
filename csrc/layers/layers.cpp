#include "layers/layers.hpp"

#include <algorithm>
#include <type_traits>

#include "common/parallel.hpp"
#include "common/sizes.hpp"
#include "simd/kernels.inc.hpp"

namespace codeact {
namespace {

constexpr std::int64_t kBlock = 32;  // rows that a thread takes at a time

template <class Byte>
auto* row_of(const BasicRows<Byte>& rows, std::int64_t row) {
  using Plain = std::conditional_t<std::is_const_v<Byte>, const unsigned char, unsigned char>;
  return reinterpret_cast<Plain*>(rows.data) + row * rows.stride;
}

template <class Work>  // work(row)
void each_row(std::int64_t rows, std::int64_t columns, int threads, const Work& work) {
  // An element takes about as long as 16 multiplications of a product.
  const double effort = 16.0 * static_cast<double>(rows) * static_cast<double>(columns);
  share(worthwhile_threads(effort, threads), ceil_div(rows, kBlock), [&](int, std::int64_t block) {
    for (std::int64_t row = block * kBlock; row < std::min(rows, (block + 1) * kBlock); ++row) work(row);
  });
}

}  // namespace

void rms_norm(const Rows& x, const std::byte* weight, float epsilon, const WritableRows& output, Element element,
              int threads, std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, element);
  const auto* scale = reinterpret_cast<const unsigned char*>(weight);
  const bool half = element == Element::bfloat16;
  each_row(x.rows, x.columns, threads, [&](std::int64_t row) {
    kernels.normalize_row(row_of(x, row), scale, x.columns, half, epsilon, row_of(output, row));
  });
}

void silu_multiply(const Rows& gate, const Rows& up, const WritableRows& output, Element element, int threads,
                   std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, element);
  each_row(gate.rows, gate.columns, threads, [&](std::int64_t row) {
    kernels.gate_row(row_of(gate, row), row_of(up, row), gate.columns, element == Element::bfloat16,
                     row_of(output, row));
  });
}

void rotate(const Rows& x, const Heads& from, const Rows& cosine, const Rows& sine, const WritableRows& output,
            const Heads& to, Element element, int threads, std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, element);
  each_row(x.rows, x.columns * from.heads, threads, [&](std::int64_t token) {
    for (std::int64_t head = 0; head < from.heads; ++head)
      kernels.rotate_row(row_of(x, token) + head * from.head_stride, row_of(cosine, token), row_of(sine, token),
                         x.columns, element == Element::bfloat16, row_of(output, token) + head * to.head_stride);
  });
}

}  // namespace codeact
