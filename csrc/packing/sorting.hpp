// Lengths as a caller's array holds them -> checked, then in order. The first half of packing.cpp's work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common/large_array.hpp"

namespace codeact {

// An array of any integer type with any stride, aligned or not. `stride` is in bytes and may be negative or zero.
struct IntegerView {
  const std::byte* data;
  std::int64_t size;
  std::int64_t stride;
  std::uint8_t item_bytes;  // 1, 2, 4 or 8
  bool is_signed;
};

struct CheckedLengths {
  std::span<const std::uint32_t> values;
  std::uint32_t limit = 0;  // no length is over it, and some length is over half of it
};

// Copies the lengths into `copy` (lengths.size elements, the caller's) and checks 1 <= length <= capacity. The planner
// sees only this copy: another thread that writes to the caller's array meanwhile can then make a wrong plan of its own
// array, but no write out of bounds.
// Throws std::invalid_argument that names the position and value of the first length out of range.
CheckedLengths check_lengths(const IntegerView& lengths, std::uint32_t capacity, std::uint32_t* copy);

// Items of one length.
struct Run {
  std::uint32_t length;
  std::uint32_t count;
};

struct SortedItems {
  LargeArray<std::uint32_t> order;  // positions, longest length first, ties by position
  LargeArray<Run> runs;             // lengths strictly falling
};

// Time O(items) and the bits of the longest length; memory O(items).
SortedItems sort_longest_first(const CheckedLengths& lengths);

}  // namespace codeact
