// loss_and_slope under address and undefined-behaviour sanitizers: logits in memory of just their size, compared with
// float64, for every instruction set that this machine has.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "nll/loss_slope.hpp"

namespace {

using codeact::Element;

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

float read(const std::byte* at, Element element) {
  std::uint32_t bits = 0;
  std::uint16_t half = 0;
  if (element == Element::float32)
    std::memcpy(&bits, at, 4);
  else
    std::memcpy(&half, at, 2), bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void check(std::int64_t rows, std::int64_t columns, Element element, std::string_view set, std::mt19937& random) {
  const std::int64_t bytes = element == Element::float32 ? 4 : 2;
  const std::int64_t stride = columns * bytes + static_cast<std::int64_t>(random() % 5) * bytes;
  const std::int64_t size = rows > 0 ? (rows - 1) * stride + columns * bytes : 0;
  const auto logits = std::make_unique<std::byte[]>(static_cast<std::size_t>(size));
  std::memset(logits.get(), 0xff, static_cast<std::size_t>(size));  // NaN between the rows
  std::normal_distribution<float> normal(0, 6);
  std::vector<std::int64_t> targets;
  std::vector<float> scale;
  std::vector<float> bias;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t v = 0; v < columns; ++v) {
      const float value = normal(random);
      const auto* stored = reinterpret_cast<const std::byte*>(&value) + (4 - bytes);
      std::memcpy(logits.get() + row * stride + v * bytes, stored, static_cast<std::size_t>(bytes));
    }
    targets.push_back(random() % 6 ? static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(columns)) : -100);
    scale.push_back(normal(random));
  }
  for (std::int64_t v = 0; v < columns; ++v) bias.push_back(normal(random));
  const bool biased = random() % 2;
  const bool scaled = random() % 2;
  const bool slope = random() % 4;
  const auto softcap = random() % 2 ? std::optional<float>(5.0F) : std::nullopt;
  const std::vector<std::byte> before(logits.get(), logits.get() + size);

  std::vector<float> losses(static_cast<std::size_t>(rows), -1);
  codeact::loss_and_slope({.element = element,
                           .logits = logits.get(),
                           .rows = rows,
                           .columns = columns,
                           .row_stride = stride,
                           .targets = targets.data(),
                           .bias = biased ? bias.data() : nullptr,
                           .softcap = softcap,
                           .ignore_index = -100,
                           .scale = scaled ? scale.data() : nullptr,
                           .slope = slope,
                           .losses = losses.data()},
                          2, set);
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<std::size_t>(row);
    std::vector<double> z;
    double sum = 0;
    for (std::int64_t v = 0; v < columns; ++v) {
      double value = double{read(before.data() + row * stride + v * bytes, element)} +
                     (biased ? double{bias[static_cast<std::size_t>(v)]} : 0);
      if (softcap) value = *softcap * std::tanh(value / *softcap);
      z.push_back(value);
      sum += std::exp(value);
    }
    const bool ignored = targets[at] == -100;
    const double lse = std::log(sum);
    if (ignored
            ? losses[at] != 0
            : !(std::abs(losses[at] - (lse - z[static_cast<std::size_t>(targets[at])])) <= 1e-5 * (1 + std::abs(lse))))
      fail(std::string(set) + ": loss of row " + std::to_string(row) + ": " + std::to_string(losses[at]));
    for (std::int64_t v = 0; v < columns; ++v) {
      const double value = z[static_cast<std::size_t>(v)];
      double expected = std::exp(value - lse) - (v == targets[at] ? 1 : 0);
      if (softcap) expected *= 1 - value / *softcap * (value / *softcap);
      if (ignored) expected = 0;
      if (scaled) expected *= double{scale[at]};
      const float got = read(logits.get() + row * stride + v * bytes, element);
      const float was = read(before.data() + row * stride + v * bytes, element);
      const double room = (element == Element::float32 ? 1e-5 : 4e-3) * std::abs(expected) +
                          1e-6 * (scaled ? std::abs(double{scale[at]}) : 1);
      if (slope ? !(std::abs(got - expected) <= room) : got != was)
        fail(std::string(set) + ": slope " + std::to_string(v) + " of row " + std::to_string(row) + ": " +
             std::to_string(got) + ", not " + std::to_string(expected));
    }
    if (row + 1 < rows)
      for (std::int64_t i = row * stride + columns * bytes; i < (row + 1) * stride; ++i)
        if (logits[static_cast<std::size_t>(i)] != std::byte{0xff}) fail("what lies between the rows was written to");
  }
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (const std::string_view set : codeact::instruction_sets()) {
    for (const Element element : {Element::float32, Element::bfloat16}) {
      for (int round = 0; round < 80; ++round)
        check(static_cast<std::int64_t>(random() % 9), 1 + static_cast<std::int64_t>(random() % 300), element, set,
              random);
      check(3, 1, element, set, random);
      check(40, 3000, element, set, random);  // on two threads
    }
    for (const std::int64_t target : {-1, 1}) {
      float logit = 0;
      float loss = 0;
      try {
        codeact::loss_and_slope({.element = Element::float32,
                                 .logits = reinterpret_cast<std::byte*>(&logit),
                                 .rows = 1,
                                 .columns = 1,
                                 .row_stride = 4,
                                 .targets = &target,
                                 .bias = nullptr,
                                 .softcap = std::nullopt,
                                 .ignore_index = -100,
                                 .scale = nullptr,
                                 .slope = true,
                                 .losses = &loss},
                                1, set);
        fail("a target out of range was taken");
      } catch (const std::invalid_argument&) {
      }
    }
    std::printf("loss_and_slope %s: ok\n", std::string(set).c_str());
  }
}
