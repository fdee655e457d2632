// varlen_attention and its gradients under address and undefined-behaviour sanitizers: operands in memory of just their
// size, compared with float64, for every instruction set that this machine has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.hpp"

namespace {

using Values = std::vector<float>;

Values random_values(std::int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Values values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// (tokens, heads, width) in memory.
codeact::HeadsView view(const Values& values, std::int64_t tokens, std::int64_t heads, std::int64_t width) {
  return {.data = reinterpret_cast<const std::byte*>(values.data()),
          .heads = heads,
          .tokens = tokens,
          .width = width,
          .head_stride = width * 4,
          .token_stride = heads * width * 4};
}

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

void check(std::mt19937& random) {
  const auto up_to = [&](std::uint32_t most) { return 1 + static_cast<std::int64_t>(random() % most); };
  std::vector<std::int32_t> bounds{0};
  for (std::int64_t samples = up_to(5); samples > 0; --samples)
    bounds.push_back(bounds.back() + static_cast<std::int32_t>(random() % 9 ? up_to(60) : up_to(900)));
  const std::int64_t tokens = bounds.back();
  const std::int64_t groups = up_to(2);
  const std::int64_t heads = groups * up_to(2);
  const std::int64_t width = up_to(40);
  const std::int64_t value_width = up_to(40);
  const Values queries = random_values(tokens * heads * width, random);
  const Values keys = random_values(tokens * groups * width, random);
  const Values values = random_values(tokens * groups * value_width, random);
  const Values slopes = random_values(tokens * heads * value_width, random);
  const float scale = 0.5F;

  const auto at = [](const Values& all, std::int64_t index) { return double{all[static_cast<std::size_t>(index)]}; };
  std::vector<double> output(slopes.size());
  std::vector<double> query_gradient(queries.size());
  std::vector<double> key_gradient(keys.size());
  std::vector<double> value_gradient(values.size());
  for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample)
    for (std::int64_t query = bounds[sample]; query < bounds[sample + 1]; ++query)
      for (std::int64_t head = 0; head < heads; ++head) {
        const std::int64_t group = head / (heads / groups);
        const std::int64_t query_row = (query * heads + head) * width;
        const std::int64_t output_row = (query * heads + head) * value_width;
        const auto key_row = [&](std::size_t i) {
          return ((bounds[sample] + static_cast<std::int64_t>(i)) * groups + group) * width;
        };
        const auto value_row = [&](std::size_t i) { return key_row(i) / width * value_width; };
        std::vector<double> weights(static_cast<std::size_t>(query + 1 - bounds[sample]));
        std::vector<double> products(weights.size());  // of the output's gradient with the values
        for (std::size_t i = 0; i < weights.size(); ++i) {
          for (std::int64_t d = 0; d < width; ++d) weights[i] += at(queries, query_row + d) * at(keys, key_row(i) + d);
          for (std::int64_t d = 0; d < value_width; ++d)
            products[i] += at(slopes, output_row + d) * at(values, value_row(i) + d);
          weights[i] *= double{scale};
        }
        const double top = *std::max_element(weights.begin(), weights.end());
        double total = 0;
        for (double& weight : weights) total += weight = std::exp(weight - top);
        double mean = 0;
        for (std::size_t i = 0; i < weights.size(); ++i) mean += (weights[i] /= total) * products[i];
        const auto add = [](std::vector<double>& sums, std::int64_t index, double value) {
          sums[static_cast<std::size_t>(index)] += value;
        };
        for (std::size_t i = 0; i < weights.size(); ++i) {
          const double slope = double{scale} * weights[i] * (products[i] - mean);
          for (std::int64_t d = 0; d < width; ++d) {
            add(query_gradient, query_row + d, slope * at(keys, key_row(i) + d));
            add(key_gradient, key_row(i) + d, slope * at(queries, query_row + d));
          }
          for (std::int64_t d = 0; d < value_width; ++d) {
            add(output, output_row + d, weights[i] * at(values, value_row(i) + d));
            add(value_gradient, value_row(i) + d, weights[i] * at(slopes, output_row + d));
          }
        }
      }

  for (const std::string_view set : codeact::instruction_sets()) {
    const auto compare = [&](const char* what, const Values& ours, const std::vector<double>& expected) {
      for (std::size_t i = 0; i < ours.size(); ++i)
        if (!(std::abs(double{ours[i]} - expected[i]) < 1e-4 + 1e-4 * std::abs(expected[i])))
          fail(std::string(set) + ": element " + std::to_string(i) + " of " + what);
    };
    const auto bytes = [](Values& all) { return reinterpret_cast<std::byte*>(all.data()); };
    const codeact::AttentionOperands operands{.element = codeact::Element::float32,
                                              .queries = view(queries, tokens, heads, width),
                                              .keys = view(keys, tokens, groups, width),
                                              .values = view(values, tokens, groups, value_width),
                                              .bounds = bounds,
                                              .scale = scale};
    Values ours(output.size());
    codeact::varlen_attention(operands, bytes(ours), 2, set);
    compare("the output", ours, output);
    // Every sample cut in two, of which the second goes on the first: the same bits.
    std::vector<std::int32_t> cuts{0};
    std::vector<std::int32_t> prefixes;
    for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample) {
      const auto length = static_cast<std::uint32_t>(bounds[sample + 1] - bounds[sample]);
      cuts.push_back(bounds[sample] + static_cast<std::int32_t>(random() % (length + 1)));
      cuts.push_back(bounds[sample + 1]);
      prefixes.push_back(-1);
      prefixes.push_back(2 * static_cast<std::int32_t>(sample));
    }
    codeact::AttentionOperands in_two = operands;
    in_two.bounds = cuts;
    in_two.prefixes = prefixes;
    Values again(output.size());
    codeact::varlen_attention(in_two, bytes(again), 2, set);
    if (again != ours) fail(std::string(set) + ": a beginning apart changes bits");
    Values of_queries(queries.size());
    Values of_keys(keys.size());
    Values of_values(values.size());
    codeact::varlen_attention_backward(operands, view(slopes, tokens, heads, value_width),
                                       {bytes(of_queries), bytes(of_keys), bytes(of_values)}, 2, set);
    compare("the gradient of the queries", of_queries, query_gradient);
    compare("the gradient of the keys", of_keys, key_gradient);
    compare("the gradient of the values", of_values, value_gradient);
  }
}

}  // namespace

int main() {
  std::mt19937 random(11);
  for (int round = 0; round < 40; ++round) check(random);
  const Values three{1, 2, 3};
  const std::vector<std::int32_t> wrong{0, 4};
  Values output(3);
  for (const std::string_view set : codeact::instruction_sets()) {
    const codeact::AttentionOperands operands{.element = codeact::Element::float32,
                                              .queries = view(three, 3, 1, 1),
                                              .keys = view(three, 3, 1, 1),
                                              .values = view(three, 3, 1, 1),
                                              .bounds = wrong,
                                              .scale = 1};
    auto* bytes = reinterpret_cast<std::byte*>(output.data());
    const auto refuses = [](const auto& call) {
      try {
        call();
      } catch (const std::invalid_argument&) {
        return;
      }
      fail("bounds past the last token were taken");
    };
    refuses([&] { codeact::varlen_attention(operands, bytes, 1, set); });
    refuses([&] { codeact::varlen_attention_backward(operands, view(three, 3, 1, 1), {bytes, bytes, bytes}, 1, set); });
    std::printf("varlen_attention %s: ok\n", std::string(set).c_str());
  }
}
