#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention.hpp"
#include "attention/pieces.hpp"
#include "common/large_array.hpp"
#include "common/parallel.hpp"
#include "simd/kernels.inc.hpp"

namespace codeact {
namespace {

// A long sample is cut into pieces of equal work. Each sums up gradients of keys and values of its own, which are added
// afterwards, so not too many: their sums take three times the memory of the gradients in float32.
constexpr std::int64_t kShortest = 384;
constexpr std::int64_t kMostPieces = 4;

struct Scratch {
  LargeArray<std::uint32_t> keys;
  LargeArray<std::uint32_t> values;
  LargeArray<float> key_rows;
  LargeArray<std::uint32_t> tile;
  LargeArray<float> query_rows;
  LargeArray<float> output_rows;
  LargeArray<float> weights;
  LargeArray<float> slopes;
  LargeArray<float> product;
};

// Where to cut a sample, from 0 to its length; its length alone decides, so that a sample has the same bits anywhere.
std::vector<std::int64_t> cuts_of(std::int64_t length, std::int64_t unit) {
  const std::int64_t count = std::clamp<std::int64_t>(length / kShortest, 1, kMostPieces);
  std::vector<std::int64_t> cuts{0};
  for (std::int64_t i = 1; i < count; ++i) {
    // Work grows with the square of the queries done.
    const double share = std::sqrt(static_cast<double>(i) / static_cast<double>(count));
    cuts.push_back(static_cast<std::int64_t>(share * static_cast<double>(length)) / unit * unit);
  }
  cuts.push_back(length);
  return cuts;
}

// The pieces of one sample and group, which follow each other.
struct Sum {
  std::size_t first_piece;
  std::size_t pieces;
};

}  // namespace

void varlen_attention_backward(const AttentionOperands& operands, const HeadsView& output_gradient,
                               const AttentionGradients& gradients, int threads, std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, operands.element);
  const auto& [element, queries, keys, values, bounds, scale, prefixes] = operands;
  check_bounds(bounds, queries.tokens);
  if (queries.tokens == 0) return;

  const std::int64_t columns = round_up(queries.width, kernels.value_columns);
  const std::int64_t value_columns = round_up(values.width, kernels.value_columns);
  std::vector<AttentionPiece> pieces;
  std::vector<std::size_t> offsets;  // of a piece's sums: those of the keys, then those of the values
  std::vector<Sum> sums;
  std::size_t sum_size = 0;
  std::int64_t longest = 0;
  double work = 0;
  for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample) {
    const std::int64_t length = bounds[sample + 1] - bounds[sample];
    if (length == 0) continue;
    longest = std::max(longest, length);
    const std::vector<std::int64_t> cuts = cuts_of(length, kernels.gradient_queries);
    for (std::int64_t group = 0; group < keys.heads; ++group) {
      sums.push_back({pieces.size(), cuts.size() - 1});
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        pieces.push_back({bounds[sample], cuts[i], cuts[i + 1], group});
        offsets.push_back(sum_size);
        work += pieces.back().work() * static_cast<double>(queries.heads / keys.heads * queries.width) * 2.5;
        sum_size += static_cast<std::size_t>(round_up(cuts[i + 1], kernels.tile_rows) * (columns + value_columns));
      }
    }
  }

  threads = worthwhile_threads(work, threads);
  const auto words = [&](std::int64_t width) { return kernels.pairs ? (width + 1) / 2 : width; };
  const std::int64_t most_keys = round_up(longest, kernels.panel_columns);
  const auto size = [](std::int64_t rows, std::int64_t width) { return static_cast<std::size_t>(rows * width); };
  LargeArray<float> partial(sum_size);
  std::vector<Scratch> scratch(static_cast<std::size_t>(threads));
  for (Scratch& own : scratch) {
    own.keys.resize(size(most_keys, words(queries.width)));
    own.values.resize(size(most_keys, words(values.width)));
    own.key_rows.resize(size(most_keys, columns));
    own.tile.resize(size(words(std::max(queries.width, values.width)), kernels.tile_rows));
    own.query_rows.resize(size(kernels.gradient_queries, columns));
    own.output_rows.resize(size(kernels.gradient_queries, value_columns));
    own.weights.resize(size(kernels.gradient_queries, most_keys + kernels.lanes));
    own.slopes.resize(size(kernels.gradient_queries, most_keys + kernels.lanes));
    own.product.resize(size(kernels.tile_rows, columns));
  }

  const bool bfloat16 = element == Element::bfloat16;
  const std::int64_t bytes = bfloat16 ? 2 : 4;
  const auto target = [bytes](std::byte* data, std::int64_t heads, std::int64_t width, std::int64_t token,
                              std::int64_t head) {
    return WritableAttentionRows{reinterpret_cast<unsigned char*>(data) + (token * heads + head) * width * bytes,
                                 heads * width * bytes, width * bytes};
  };
  const auto key_sums = [&](std::size_t piece) { return partial.data() + offsets[piece]; };
  const auto value_sums = [&](std::size_t piece) {
    return key_sums(piece) + round_up(pieces[piece].end, kernels.tile_rows) * columns;
  };

  const std::vector<std::size_t> order = longest_first(pieces);
  share(threads, static_cast<std::int64_t>(pieces.size()), [&](int thread, std::int64_t item) {
    const std::size_t index = order[static_cast<std::size_t>(item)];
    const AttentionPiece& piece = pieces[index];
    const AttentionPart part = part_of(operands, piece);
    const std::int64_t head = piece.group * part.heads;
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    kernels.attend_backward(part,
                            {.output = rows_of(output_gradient, piece.first, head),
                             .queries = target(gradients.queries, queries.heads, queries.width, piece.first, head),
                             .keys = key_sums(index),
                             .values = value_sums(index)},
                            {.keys = own.keys.data(),
                             .values = own.values.data(),
                             .key_rows = own.key_rows.data(),
                             .tile = own.tile.data(),
                             .query_rows = own.query_rows.data(),
                             .output_rows = own.output_rows.data(),
                             .weights = own.weights.data(),
                             .slopes = own.slopes.data(),
                             .product = own.product.data()});
  });

  share(threads, static_cast<std::int64_t>(sums.size()), [&](int, std::int64_t item) {
    const auto& [first_piece, count] = sums[static_cast<std::size_t>(item)];
    const std::size_t last = first_piece + count - 1;  // has all keys
    const auto finish = [&](const auto& sums_of, std::int64_t stride, std::int64_t width, std::byte* gradient) {
      float* total = sums_of(last);
      for (std::size_t piece = first_piece; piece < last; ++piece) {
        const float* more = sums_of(piece);
        const std::int64_t elements = pieces[piece].end * stride;
        for (std::int64_t i = 0; i < elements; ++i) total[i] += more[i];
      }
      const auto rows = target(gradient, keys.heads, width, pieces[last].first, pieces[last].group);
      for (std::int64_t token = 0; token < pieces[last].end; ++token)
        kernels.store_row(total + token * stride, width, bfloat16, rows.data + token * rows.stride);
    };
    finish(key_sums, columns, queries.width, gradients.keys);
    finish(value_sums, value_columns, values.width, gradients.values);
  });
}

}  // namespace codeact
