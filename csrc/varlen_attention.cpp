#include "varlen_attention.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "large_array.hpp"
#include "parallel.hpp"

namespace codeact {
namespace {

// Queries of one piece of work. Each piece packs the keys and values that it needs, so not too few.
constexpr std::int64_t kQueries = 256;

struct Piece {
  std::int64_t first;  // token of the sample, in the pack
  std::int64_t begin;  // queries, in the sample
  std::int64_t end;
  std::int64_t group;  // head of keys and values
};

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Scratch {
  LargeArray<std::uint32_t> keys;
  LargeArray<float> values;
  LargeArray<std::uint32_t> tile;
  LargeArray<float> scores;
  LargeArray<float> output;
};

void check_bounds(std::span<const std::int32_t> bounds, std::int64_t tokens) {
  bool rising = !bounds.empty() && bounds.front() == 0 && bounds.back() == tokens;
  for (std::size_t i = 1; i < bounds.size(); ++i) rising = rising && bounds[i - 1] <= bounds[i];
  if (!rising) throw std::invalid_argument("cu_seqlens must rise from 0 to " + std::to_string(tokens));
}

}  // namespace

void varlen_attention(const VarlenAttention& problem, int threads, std::string_view instruction_set) {
  const Kernels& kernels = kernels_of(instruction_set, problem.element);
  const auto& [element, queries, keys, values, bounds, scale, output] = problem;
  check_bounds(bounds, queries.tokens);
  if (queries.tokens == 0 || queries.heads == 0) return;

  std::vector<Piece> pieces;
  std::int64_t longest = 0;
  double work = 0;
  for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample) {
    const std::int64_t first = bounds[sample];
    const std::int64_t length = bounds[sample + 1] - first;
    longest = std::max(longest, length);
    work += static_cast<double>(length) * static_cast<double>(length) * static_cast<double>(queries.heads) *
            static_cast<double>(queries.width);
    for (std::int64_t begin = 0; begin < length; begin += kQueries)
      for (std::int64_t group = 0; group < keys.heads; ++group)
        pieces.push_back({first, begin, std::min(begin + kQueries, length), group});
  }
  // The longest first, so that the threads end together.
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return (a.end - a.begin) * a.end > (b.end - b.begin) * b.end;
  });

  threads = worthwhile_threads(work, threads);
  const std::int64_t words = kernels.pairs ? (queries.width + 1) / 2 : queries.width;
  const std::int64_t most_keys = round_up(longest, kernels.panel_columns);
  const std::int64_t value_columns = round_up(values.width, kernels.value_columns);
  std::vector<Scratch> scratch(static_cast<std::size_t>(threads));
  for (Scratch& own : scratch) {
    own.keys.resize(static_cast<std::size_t>(most_keys * words));
    own.values.resize(static_cast<std::size_t>(most_keys * value_columns));
    own.tile.resize(static_cast<std::size_t>(words * kernels.tile_rows));
    own.scores.resize(static_cast<std::size_t>(kernels.tile_rows * most_keys));
    own.output.resize(static_cast<std::size_t>(kernels.tile_rows * value_columns));
  }

  const std::int64_t bytes = problem.element == Element::bfloat16 ? 2 : 4;
  const std::int64_t heads_each = queries.heads / keys.heads;
  share(threads, static_cast<std::int64_t>(pieces.size()), [&](int thread, std::int64_t item) {
    const Piece& piece = pieces[static_cast<std::size_t>(item)];
    const auto at = [&](const HeadsView& view, std::int64_t head) {
      return reinterpret_cast<const unsigned char*>(view.data) + head * view.head_stride +
             piece.first * view.token_stride;
    };
    const std::int64_t output_head = problem.values.width * bytes;
    const std::int64_t output_token = problem.queries.heads * output_head;
    const std::int64_t head = piece.group * heads_each;
    const AttentionPart part{
        .queries = at(problem.queries, head),
        .query_stride = problem.queries.token_stride,
        .head_stride = problem.queries.head_stride,
        .keys = at(problem.keys, piece.group),
        .key_stride = problem.keys.token_stride,
        .values = at(problem.values, piece.group),
        .value_row_stride = problem.values.token_stride,
        .output = reinterpret_cast<unsigned char*>(problem.output) + piece.first * output_token + head * output_head,
        .output_stride = output_token,
        .output_head_stride = output_head,
        .begin = piece.begin,
        .end = piece.end,
        .width = problem.queries.width,
        .value_width = problem.values.width,
        .heads = static_cast<int>(heads_each),
        .bfloat16 = problem.element == Element::bfloat16,
        .scale = problem.scale};
    Scratch& own = scratch[static_cast<std::size_t>(thread)];
    kernels.attend(part, {.keys = own.keys.data(),
                          .values = own.values.data(),
                          .tile = own.tile.data(),
                          .scores = own.scores.data(),
                          .output = own.output.data()});
  });
}

}  // namespace codeact
