#include <algorithm>
#include <vector>

#include "attention/attention.hpp"
#include "attention/pieces.hpp"
#include "common/large_array.hpp"
#include "common/parallel.hpp"
#include "simd/kernels.inc.hpp"

namespace codeact {
namespace {

// Queries of one piece of work. Each piece packs the keys and values that it needs, so not too few.
constexpr std::int64_t kQueries = 256;

struct Scratch {
  LargeArray<unsigned char> mixed;
  LargeArray<std::uint32_t> keys;
  LargeArray<float> values;
  LargeArray<std::uint32_t> tile;
  LargeArray<float> scores;
  LargeArray<float> output;
};

}  // namespace

void varlen_attention(const AttentionOperands& operands, std::byte* output, int threads,
                      std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, operands.element);
  const auto& [element, queries, keys, values, bounds, scale, prefixes] = operands;
  check_bounds(bounds, queries.tokens);
  check_prefixes(prefixes, bounds.size() - 1);
  if (queries.tokens == 0 || queries.heads == 0) return;

  std::vector<AttentionPiece> pieces;
  std::int64_t longest = 0;
  double work = 0;
  for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample) {
    const std::int64_t first = bounds[sample];
    const std::int64_t length = bounds[sample + 1] - first;
    const bool follows = !prefixes.empty() && prefixes[sample] >= 0;
    const auto other = static_cast<std::size_t>(follows ? prefixes[sample] : 0);
    const std::int64_t prefix = bounds[other];
    const std::int64_t before = follows ? bounds[other + 1] - prefix : 0;
    longest = std::max(longest, before + length);
    work += static_cast<double>(length) * static_cast<double>(length + 2 * before) *
            static_cast<double>(queries.heads) * static_cast<double>(queries.width);
    for (std::int64_t begin = 0; begin < length; begin += kQueries)
      for (std::int64_t group = 0; group < keys.heads; ++group)
        pieces.push_back({first, begin, std::min(begin + kQueries, length), group, prefix, before});
  }
  const std::vector<std::size_t> order = longest_first(pieces);

  threads = worthwhile_threads(work, threads);
  const std::int64_t words = kernels.pairs ? (queries.width + 1) / 2 : queries.width;
  const std::int64_t most_keys = round_up(longest, kernels.panel_columns);
  const std::int64_t value_columns = round_up(values.width, kernels.value_columns);
  std::vector<Scratch> scratch(static_cast<std::size_t>(threads));
  const std::int64_t element_size = element == Element::bfloat16 ? 2 : 4;
  for (Scratch& own : scratch) {
    own.mixed.resize(static_cast<std::size_t>(kernels.panel_columns * queries.width * element_size));
    own.keys.resize(static_cast<std::size_t>(most_keys * words));
    own.values.resize(static_cast<std::size_t>(most_keys * value_columns));
    own.tile.resize(static_cast<std::size_t>(words * kernels.tile_rows));
    own.scores.resize(static_cast<std::size_t>(kernels.tile_rows * most_keys));
    own.output.resize(static_cast<std::size_t>(kernels.tile_rows * value_columns));
  }

  const std::int64_t output_head = values.width * element_size;
  const std::int64_t output_token = queries.heads * output_head;
  share(threads, static_cast<std::int64_t>(pieces.size()), [&](int thread, std::int64_t item) {
    const AttentionPiece& piece = pieces[order[static_cast<std::size_t>(item)]];
    const AttentionPart part = part_of(operands, piece);
    unsigned char* target =
        reinterpret_cast<unsigned char*>(output) + piece.first * output_token + piece.group * part.heads * output_head;
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    kernels.attend(part, {target, output_token, output_head},
                   {.mixed = own.mixed.data(),
                    .keys = own.keys.data(),
                    .values = own.values.data(),
                    .tile = own.tile.data(),
                    .scores = own.scores.data(),
                    .output = own.output.data()});
  });
}

}  // namespace codeact
