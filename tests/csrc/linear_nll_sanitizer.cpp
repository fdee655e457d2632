// linear_nll under address and undefined-behaviour sanitizers: operands in memory of just their size, compared with
// float64, for every instruction set that this machine has.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "nll/linear_nll.hpp"

namespace {

using codeact::Element;

// Rows of `columns` values, `gap` bytes apart, in a block that ends with the last value.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t gap, Element element, std::mt19937& random)
      : values(static_cast<std::size_t>(rows * columns)) {
    const std::int64_t bytes = element == Element::float32 ? 4 : 2;
    const std::int64_t stride = columns * bytes + gap;
    const std::int64_t size = rows > 0 ? (rows - 1) * stride + columns * bytes : 0;
    block = std::make_unique<std::byte[]>(static_cast<std::size_t>(size));
    std::memset(block.get(), 0xff, static_cast<std::size_t>(size));  // NaN between the rows
    std::normal_distribution<float> normal;
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column) {
        const float value = normal(random);
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (element == Element::bfloat16) bits &= 0xffff0000U;
        float kept;
        std::memcpy(&kept, &bits, 4);
        values[static_cast<std::size_t>(row * columns + column)] = kept;
        const auto* stored = reinterpret_cast<const std::byte*>(&bits) + (4 - bytes);
        std::memcpy(block.get() + row * stride + column * bytes, stored, static_cast<std::size_t>(bytes));
      }
    view = {.data = block.get(), .rows = rows, .columns = columns, .row_stride = stride};
  }
  std::vector<float> values;
  std::unique_ptr<std::byte[]> block;
  codeact::MatrixView view{};
};

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

double reference(const Matrix& hidden, const Matrix& weight, std::int64_t row, std::int64_t target, const float* bias,
                 std::optional<float> softcap) {
  const std::int64_t width = hidden.view.columns;
  double sum = 0;
  double target_logit = 0;
  for (std::int64_t v = 0; v < weight.view.rows; ++v) {
    double z = bias ? bias[v] : 0;
    for (std::int64_t d = 0; d < width; ++d)
      z += double{hidden.values[static_cast<std::size_t>(row * width + d)]} *
           double{weight.values[static_cast<std::size_t>(v * width + d)]};
    if (softcap) z = *softcap * std::tanh(z / *softcap);
    if (v == target) target_logit = z;
    sum += std::exp(z);
  }
  return std::log(sum) - target_logit;
}

void check(std::int64_t tokens, std::int64_t width, std::int64_t vocabulary, Element element, std::mt19937& random) {
  const std::int64_t gap = static_cast<std::int64_t>(random() % 5) * 2;
  const Matrix hidden(tokens, width, gap, element, random);
  const Matrix weight(vocabulary, width, gap, element, random);
  std::vector<std::int64_t> targets;
  for (std::int64_t row = 0; row < tokens; ++row)
    targets.push_back(random() % 4 ? static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(vocabulary))
                                   : -100);
  std::vector<float> bias;
  for (std::int64_t v = 0; v < vocabulary; ++v) bias.push_back(static_cast<float>(random() % 7) - 3);
  const bool biased = random() % 2;
  const auto softcap = random() % 2 ? std::optional<float>(5.0F) : std::nullopt;
  for (const std::string_view set : codeact::instruction_sets()) {
    std::vector<float> losses(static_cast<std::size_t>(tokens), -1);
    const codeact::LinearNll problem{.element = element,
                                     .hidden = hidden.view,
                                     .weight = weight.view,
                                     .targets = targets.data(),
                                     .bias = biased ? bias.data() : nullptr,
                                     .softcap = softcap,
                                     .ignore_index = -100,
                                     .losses = losses.data()};
    codeact::linear_nll(problem, 2, set);
    for (std::int64_t row = 0; row < tokens; ++row) {
      const auto at = static_cast<std::size_t>(row);
      const double expected =
          targets[at] == -100 ? 0
                              : reference(hidden, weight, row, targets[at], biased ? bias.data() : nullptr, softcap);
      if (!(std::abs(losses[at] - expected) <= 2e-5 * (1 + std::abs(expected))))
        fail(std::string(set) + ": row " + std::to_string(row) + " of (" + std::to_string(tokens) + ", " +
             std::to_string(width) + ", " + std::to_string(vocabulary) + "): " + std::to_string(losses[at]) + ", not " +
             std::to_string(expected));
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (const Element element : {Element::float32, Element::bfloat16}) {
    for (int round = 0; round < 60; ++round)
      check(static_cast<std::int64_t>(random() % 30), 1 + static_cast<std::int64_t>(random() % 70),
            1 + static_cast<std::int64_t>(random() % 200), element, random);
    check(3, 1, 1, element, random);
    check(0, 5, 9, element, random);
    check(5000, 3, 50, element, random);    // more rows than a block
    check(9, 2000, 3000, element, random);  // several groups and parts
  }
  const float value = 0;
  const std::int64_t target = 1;
  float loss = 0;
  const codeact::MatrixView one{
      .data = reinterpret_cast<const std::byte*>(&value), .rows = 1, .columns = 1, .row_stride = 4};
  for (const std::string_view set : codeact::instruction_sets()) {
    try {
      codeact::linear_nll({.element = Element::float32,
                           .hidden = one,
                           .weight = one,
                           .targets = &target,
                           .bias = nullptr,
                           .softcap = std::nullopt,
                           .ignore_index = -100,
                           .losses = &loss},
                          1, set);
      fail("a target out of range was taken");
    } catch (const std::invalid_argument&) {
    }
    std::printf("linear_nll %s: ok\n", std::string(set).c_str());
  }
}
