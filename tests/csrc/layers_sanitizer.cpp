// rms_norm, silu_multiply and rotate under address and undefined-behaviour sanitizers: operands in memory of just their
// size, compared with float64, for every instruction set that this machine has.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "layers/layers.hpp"

namespace {

using codeact::Element;

struct Matrix {
  std::int64_t rows, columns, bytes, stride;
  std::unique_ptr<std::byte[]> data;

  Matrix(std::int64_t r, std::int64_t c, Element element, std::mt19937& random)
      : rows(r), columns(c), bytes(element == Element::float32 ? 4 : 2) {
    stride = (columns + static_cast<std::int64_t>(random() % 3)) * bytes;
    data = std::make_unique<std::byte[]>(static_cast<std::size_t>((rows - 1) * stride + columns * bytes));
    std::normal_distribution<float> normal(0, 3);
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column) {
        const float value = normal(random);
        std::memcpy(at(row, column), reinterpret_cast<const std::byte*>(&value) + (4 - bytes),
                    static_cast<std::size_t>(bytes));
      }
  }
  std::byte* at(std::int64_t row, std::int64_t column) const { return data.get() + row * stride + column * bytes; }
  double operator()(std::int64_t row, std::int64_t column) const {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<std::byte*>(&bits) + (4 - bytes), at(row, column), static_cast<std::size_t>(bytes));
    float value;
    std::memcpy(&value, &bits, 4);
    return double{value};
  }
  codeact::Rows read() const { return {data.get(), rows, columns, stride}; }
  codeact::WritableRows write() const { return {data.get(), rows, columns, stride}; }
};

void expect(double found, double exact, Element element, const std::string& what) {
  const double tolerance = element == Element::float32 ? 1e-5 : 2e-2;
  if (std::fabs(found - exact) <= tolerance * (1 + std::fabs(exact))) return;
  std::fprintf(stderr, "%s: %g, not %g\n", what.c_str(), found, exact);
  std::exit(1);
}

void check(std::int64_t rows, std::int64_t columns, Element element, std::string_view set, std::mt19937& random) {
  const std::string name = std::string(set) + ", " + std::to_string(rows) + " x " + std::to_string(columns);
  const Matrix x(rows, columns, element, random), y(rows, columns, element, random), z(rows, columns, element, random);
  const Matrix out(rows, columns, element, random);
  const Matrix weight(1, columns, element, random);
  codeact::rms_norm(x.read(), weight.data.get(), 1e-5F, out.write(), element, 2, set);
  for (std::int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (std::int64_t c = 0; c < columns; ++c) squares += x(row, c) * x(row, c);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(columns) + 1e-5);
    for (std::int64_t c = 0; c < columns; ++c)
      expect(out(row, c), weight(0, c) * x(row, c) * scale, element, name + ", norm");
  }
  codeact::silu_multiply(x.read(), y.read(), out.write(), element, 3, set);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < columns; ++c)
      expect(out(row, c), x(row, c) / (1 + std::exp(-x(row, c))) * y(row, c), element, name + ", gate");
  if (columns % 2) return;
  codeact::rotate(x.read(), {1, 0}, y.read(), z.read(), out.write(), {1, 0}, element, 2, set);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t c = 0; c < columns; ++c) {
      const bool first = c < columns / 2;
      const double other = first ? -x(row, c + columns / 2) : x(row, c - columns / 2);
      // What cancels has lost the digits of its terms.
      const double size = std::fabs(x(row, c) * y(row, c)) + std::fabs(other * z(row, c));
      const double exact = x(row, c) * y(row, c) + other * z(row, c);
      expect((out(row, c) - exact) / (1 + size), 0, element, name + ", rotation");
    }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const std::string_view set : codeact::instruction_sets())
    for (const Element element : {Element::float32, Element::bfloat16})
      for (int round = 0; round < 40; ++round)
        check(1 + static_cast<std::int64_t>(random() % 70), 1 + static_cast<std::int64_t>(random() % 100), element, set,
              random);
  std::puts("layers: all elements are right");
}
