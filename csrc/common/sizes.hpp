// Arithmetic of sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace codeact {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::size_t as_size(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace codeact
