// What a decoder layer of the Llama kind does between its products: RMSNorm, SiLU x gate, rotary embedding.
//
// Rounded as PyTorch's own operations round; a row's bits depend on that row alone. Each throws std::invalid_argument
// for an instruction set that is not here. Where `rows` are written to, it may be the memory that is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "simd/instruction_sets.hpp"

namespace codeact {

// (T, D) elements that lie side by side in a row; rows any distance apart.
template <class Byte>
struct BasicRows {
  Byte* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;  // bytes
};
using Rows = BasicRows<const std::byte>;
using WritableRows = BasicRows<std::byte>;

// output = weight * (x / sqrt(mean(x^2) + epsilon)), weight (D,).
void rms_norm(const Rows& x, const std::byte* weight, float epsilon, const WritableRows& output, Element element,
              int threads, std::string_view instruction_set);

// output = silu(gate) * up
void silu_multiply(const Rows& gate, const Rows& up, const WritableRows& output, Element element, int threads,
                   std::string_view instruction_set);

// Heads of tokens, (H, T, D) with D even: output = x * cosine + rotate_half(x) * sine; (T, D) each.
struct Heads {
  std::int64_t heads;
  std::int64_t head_stride;  // bytes
};
void rotate(const Rows& x, const Heads& from, const Rows& cosine, const Rows& sine, const WritableRows& output,
            const Heads& to, Element element, int threads, std::string_view instruction_set);

}  // namespace codeact
