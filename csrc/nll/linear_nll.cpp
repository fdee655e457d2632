#include "nll/linear_nll.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/large_array.hpp"
#include "common/parallel.hpp"
#include "common/sizes.hpp"
#include "simd/kernels.inc.hpp"

// The logits are a matrix product, made one small rectangle after another and used up on the spot: a rectangle stays in
// registers until its exponentials are summed. What is left is to read both operands from caches that are near enough:
//
//   for each block of rows           packed once, tiles side by side: at most 8 MiB, stays in the outer cache
//     for each part of the vocabulary          the unit of work of a thread
//       for each group of panels               packed once a block, stays in a core's own cache
//         for each tile of the block           read once a group
//           for each panel of the group        multiply, add up exponentials
//
// Parts are the same whatever the number of threads, and are merged in their order, so the result is too.

namespace codeact {
namespace {

constexpr std::int64_t kBlockBytes = std::int64_t{8} << 20;
constexpr std::int64_t kMostBlockRows = 4096;  // the sums of these rows lie in a core's cache as well
constexpr std::int64_t kGroupBytes = std::int64_t{256} << 10;
constexpr std::int64_t kMostParts = 64;  // enough to share among threads, few to merge

// What one thread works in.
struct Scratch {
  LargeArray<std::uint32_t> panels;  // of a group
  LargeArray<float> sums;            // (block rows, lanes)
  LargeArray<float> bias;            // (panel columns,)
  LargeArray<float> mask;            // (panel columns,)
};

class Solver {
 public:
  Solver(const LinearNll& problem, const Kernels& kernels, int threads) : p_(problem), k_(kernels) {
    words_ = k_.pairs ? ceil_div(p_.weight.columns, 2) : p_.weight.columns;
    panels_ = std::max<std::int64_t>(ceil_div(p_.weight.rows, k_.panel_columns), 1);
    const std::int64_t panel_bytes = std::max<std::int64_t>(words_ * k_.panel_columns * 4, 1);
    group_ = std::clamp<std::int64_t>(kGroupBytes / panel_bytes, 1, panels_);
    parts_ = std::min(kMostParts, ceil_div(panels_, group_));

    for (std::int64_t row = 0; row < p_.hidden.rows; ++row) {
      if (p_.targets[row] == p_.ignore_index)
        p_.losses[row] = 0;
      else
        kept_.push_back(row);
    }
    const auto kept = static_cast<std::int64_t>(kept_.size());
    block_ = std::clamp<std::int64_t>(kBlockBytes / std::max<std::int64_t>(words_ * 4, 1), 1, kMostBlockRows);
    block_ = ceil_div(std::min(block_, std::max<std::int64_t>(kept, 1)), k_.tile_rows) * k_.tile_rows;

    const double work = static_cast<double>(kept) * static_cast<double>(words_) * static_cast<double>(p_.weight.rows);
    threads_ = worthwhile_threads(work, threads);
  }

  void solve() {
    if (kept_.empty()) return;
    tiles_.resize(as_size(block_ * words_));
    targets_.resize(as_size(block_));
    target_logits_.resize(as_size(block_));
    references_.resize(as_size(parts_ * block_));
    totals_.resize(as_size(parts_ * block_));
    std::vector<Scratch> scratch(as_size(threads_));
    for (Scratch& own : scratch) {
      own.panels.resize(as_size(group_ * words_ * k_.panel_columns));
      own.sums.resize(as_size(block_ * k_.lanes));
      own.bias.resize(as_size(k_.panel_columns));
      own.mask.resize(as_size(k_.panel_columns));
    }
    for (std::int64_t first = 0; first < static_cast<std::int64_t>(kept_.size()); first += block_) {
      const std::int64_t rows = std::min<std::int64_t>(block_, static_cast<std::int64_t>(kept_.size()) - first);
      const std::int64_t tiles = ceil_div(rows, k_.tile_rows);
      share(threads_, tiles, [&](int, std::int64_t tile) { pack_tile(first, rows, tile); });
      share(threads_, parts_, [&](int thread, std::int64_t part) { sum_part(tiles, part, scratch[as_size(thread)]); });
      for (std::int64_t row = 0; row < rows; ++row) p_.losses[kept_[as_size(first + row)]] = loss(row);
    }
  }

 private:
  void pack_tile(std::int64_t first, std::int64_t rows, std::int64_t tile) {
    for (int place = 0; place < k_.tile_rows; ++place) {
      const std::int64_t row = tile * k_.tile_rows + place;
      const bool real = row < rows;
      const std::int64_t at = real ? kept_[as_size(first + row)] : 0;
      const auto* data = reinterpret_cast<const unsigned char*>(p_.hidden.data) + at * p_.hidden.row_stride;
      targets_[as_size(row)] = real ? p_.targets[at] : -1;
      k_.pack_row(real ? data : nullptr, p_.hidden.columns, p_.element == Element::bfloat16, place,
                  tiles_.data() + tile * k_.tile_rows * words_);
    }
  }

  void sum_part(std::int64_t tiles, std::int64_t part, Scratch& own) {
    float* references = references_.data() + part * block_;
    std::fill_n(references, tiles * k_.tile_rows, std::numeric_limits<float>::lowest());
    std::fill_n(own.sums.data(), tiles * k_.tile_rows * k_.lanes, 0.0F);
    const std::int64_t end = panels_ * (part + 1) / parts_;
    for (std::int64_t group = panels_ * part / parts_; group < end; group += group_) {
      const std::int64_t members = std::min(group_, end - group);
      for (std::int64_t i = 0; i < members; ++i) pack_panel(group + i, own.panels.data() + i * panel_words());
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t row = tile * k_.tile_rows;
        for (std::int64_t i = 0; i < members; ++i) {
          k_.accumulate(tiles_.data() + row * words_, own.panels.data() + i * panel_words(), words_,
                        finish(group + i, own), targets_.data() + row, target_logits_.data() + row,
                        {references + row, own.sums.data() + row * k_.lanes});
        }
      }
    }
    k_.add_lanes(own.sums.data(), tiles * k_.tile_rows, totals_.data() + part * block_);
  }

  std::int64_t panel_words() const { return words_ * k_.panel_columns; }

  std::int64_t columns_of(std::int64_t panel) const {
    return std::min<std::int64_t>(k_.panel_columns, p_.weight.rows - panel * k_.panel_columns);
  }

  void pack_panel(std::int64_t panel, std::uint32_t* packed) const {
    const auto* data = reinterpret_cast<const unsigned char*>(p_.weight.data);
    k_.pack_panel(data + panel * k_.panel_columns * p_.weight.row_stride, p_.weight.row_stride,
                  static_cast<int>(columns_of(panel)), p_.weight.columns, p_.element == Element::bfloat16, packed);
  }

  Finish finish(std::int64_t panel, Scratch& own) const {
    const std::int64_t first = panel * k_.panel_columns;
    const std::int64_t columns = columns_of(panel);
    Finish result{.first_column = first, .bias = nullptr, .softcap = p_.softcap.value_or(0.0F), .mask = nullptr};
    if (p_.bias) result.bias = p_.bias + first;
    if (columns == k_.panel_columns) return result;
    if (p_.bias) {
      std::fill(std::copy_n(p_.bias + first, columns, own.bias.begin()), own.bias.end(), 0.0F);
      result.bias = own.bias.data();
    }
    std::fill(std::fill_n(own.mask.begin(), columns, 0.0F), own.mask.end(), -std::numeric_limits<float>::infinity());
    result.mask = own.mask.data();
    return result;
  }

  float loss(std::int64_t row) const {
    float top = references_[as_size(row)];
    for (std::int64_t part = 1; part < parts_; ++part) top = std::max(top, references_[as_size(part * block_ + row)]);
    double total = 0;
    for (std::int64_t part = 0; part < parts_; ++part) {
      const std::size_t at = as_size(part * block_ + row);
      total += double{totals_[at]} * std::exp(double{references_[at]} - double{top});
    }
    return static_cast<float>(double{top} - double{target_logits_[as_size(row)]} + std::log(total));
  }

  const LinearNll& p_;
  const Kernels& k_;
  std::int64_t words_;   // of a row
  std::int64_t panels_;  // of the head
  std::int64_t group_;   // panels
  std::int64_t parts_;
  std::int64_t block_;  // rows, a multiple of the tile's
  int threads_;
  std::vector<std::int64_t> kept_;  // rows with a target

  // Of one block of rows.
  LargeArray<std::uint32_t> tiles_;  // (tiles, words, tile rows)
  LargeArray<std::int64_t> targets_;
  LargeArray<float> target_logits_;
  LargeArray<float> references_;  // (parts, rows)
  LargeArray<float> totals_;      // (parts, rows)
};

}  // namespace

void linear_nll(const LinearNll& problem, int threads, std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, problem.element);
  for (std::int64_t row = 0; row < problem.hidden.rows; ++row) {
    const std::int64_t target = problem.targets[row];
    if (target != problem.ignore_index && (target < 0 || target >= problem.weight.rows))
      throw std::invalid_argument("targets[" + std::to_string(row) + "] is " + std::to_string(target) +
                                  ", outside [0, " + std::to_string(problem.weight.rows) + ")");
  }
  Solver(problem, kernels, threads).solve();
}

}  // namespace codeact
