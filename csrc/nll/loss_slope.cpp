#include "nll/loss_slope.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/parallel.hpp"
#include "simd/kernels.inc.hpp"

// A row is read three times: for its largest logit, for the sum of the exponentials and for the slopes. From the second
// time on it comes from a core's own cache, so memory is read once and written once.

namespace codeact {

void loss_and_slope(const LossSlope& problem, int threads, std::string_view instruction_set) {
  const LossSlope& p = problem;
  const Kernels& kernels = kernels_of(instruction_set, p.element);
  for (std::int64_t row = 0; row < p.rows; ++row)
    if (p.targets[row] != p.ignore_index && (p.targets[row] < 0 || p.targets[row] >= p.columns))
      throw std::invalid_argument("targets[" + std::to_string(row) + "] is " + std::to_string(p.targets[row]) +
                                  ", outside [0, " + std::to_string(p.columns) + ")");
  // An exponential takes about as long as four multiplications of a product.
  const double work = 4.0 * static_cast<double>(p.rows) * static_cast<double>(p.columns);
  share(worthwhile_threads(work, threads), p.rows, [&](int, std::int64_t row) {
    auto* data = reinterpret_cast<unsigned char*>(p.logits) + row * p.row_stride;
    if (p.targets[row] == p.ignore_index) {
      p.losses[row] = 0;
      const std::int64_t bytes = p.columns * (p.element == Element::bfloat16 ? 2 : 4);
      if (p.slope) std::memset(data, 0, static_cast<std::size_t>(bytes));
      return;
    }
    const LogitsRow logits{.data = data,
                           .columns = p.columns,
                           .target = p.targets[row],
                           .bfloat16 = p.element == Element::bfloat16,
                           .bias = p.bias,
                           .softcap = p.softcap.value_or(0.0F)};
    const RowTotal total = kernels.total_row(logits);
    p.losses[row] =
        static_cast<float>(double{total.largest} - double{total.target_logit} + std::log(double{total.sum}));
    if (p.slope) kernels.slope_row(logits, total, p.scale ? p.scale[row] : 1.0F);
  });
}

}  // namespace codeact
