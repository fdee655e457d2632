// varlen_attention under address and undefined-behaviour sanitizers: operands in memory of just their size, compared
// with float64, for every instruction set that this machine has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "varlen_attention.hpp"

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
    bounds.push_back(bounds.back() + static_cast<std::int32_t>(random() % 9 ? up_to(60) : up_to(600)));
  const std::int64_t tokens = bounds.back();
  const std::int64_t groups = up_to(2);
  const std::int64_t heads = groups * up_to(2);
  const std::int64_t width = up_to(40);
  const std::int64_t value_width = up_to(40);
  const Values queries = random_values(tokens * heads * width, random);
  const Values keys = random_values(tokens * groups * width, random);
  const Values values = random_values(tokens * groups * value_width, random);
  for (const std::string_view set : codeact::instruction_sets()) {
    Values output(static_cast<std::size_t>(tokens * heads * value_width));
    codeact::varlen_attention({.element = codeact::Element::float32,
                               .queries = view(queries, tokens, heads, width),
                               .keys = view(keys, tokens, groups, width),
                               .values = view(values, tokens, groups, value_width),
                               .bounds = bounds,
                               .scale = 0.5F,
                               .output = reinterpret_cast<std::byte*>(output.data())},
                              2, set);
    const auto at = [](const Values& all, std::int64_t index) { return double{all[static_cast<std::size_t>(index)]}; };
    for (std::size_t sample = 0; sample + 1 < bounds.size(); ++sample)
      for (std::int64_t query = bounds[sample]; query < bounds[sample + 1]; ++query)
        for (std::int64_t head = 0; head < heads; ++head) {
          const std::int64_t group = head / (heads / groups);
          std::vector<double> weights;
          for (std::int64_t key = bounds[sample]; key <= query; ++key) {
            double score = 0;
            for (std::int64_t d = 0; d < width; ++d)
              score += at(queries, (query * heads + head) * width + d) * at(keys, (key * groups + group) * width + d);
            weights.push_back(0.5 * score);
          }
          const double top = *std::max_element(weights.begin(), weights.end());
          double total = 0;
          for (double& weight : weights) total += weight = std::exp(weight - top);
          for (std::int64_t d = 0; d < value_width; ++d) {
            double expected = 0;
            for (std::size_t i = 0; i < weights.size(); ++i) {
              const std::int64_t key = bounds[sample] + static_cast<std::int64_t>(i);
              expected += weights[i] / total * at(values, (key * groups + group) * value_width + d);
            }
            if (!(std::abs(at(output, (query * heads + head) * value_width + d) - expected) < 1e-4))
              fail(std::string(set) + ": query " + std::to_string(query) + " of head " + std::to_string(head));
          }
        }
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
    try {
      codeact::varlen_attention({.element = codeact::Element::float32,
                                 .queries = view(three, 3, 1, 1),
                                 .keys = view(three, 3, 1, 1),
                                 .values = view(three, 3, 1, 1),
                                 .bounds = wrong,
                                 .scale = 1,
                                 .output = reinterpret_cast<std::byte*>(output.data())},
                                1, set);
      fail("bounds past the last token were taken");
    } catch (const std::invalid_argument&) {
    }
    std::printf("varlen_attention %s: ok\n", std::string(set).c_str());
  }
}
