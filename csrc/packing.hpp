// Lengths -> packs of at most `capacity` tokens. No Python types here; see bindings.cpp for those.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "large_array.hpp"

namespace codeact {

enum class Algorithm { best_fit_decreasing, first_fit_decreasing, next_fit };

// Items and capacity are held in 32 bits inside: half the memory traffic, and it is what a GPU's position ids can hold.
inline constexpr std::int64_t kMaxCapacity = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int64_t kMaxItems = std::int64_t{1} << 31;
inline constexpr std::uint32_t kNoItemLimit = std::numeric_limits<std::uint32_t>::max();

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
  std::int64_t tokens = 0;
  std::uint32_t longest = 0;              // 0 where there is no item
  LargeArray<std::uint32_t> counts = {};  // counts[length], for the lengths below counts.size()
};

// Copies the lengths into `copy` (lengths.size elements, the caller's) and checks 1 <= length <= capacity. The planner
// sees only this copy: another thread that writes to the caller's array meanwhile can then make a wrong plan of its own
// array, but no write out of bounds.
// Throws std::invalid_argument that names the position and value of the first length out of range.
CheckedLengths check_lengths(const IntegerView& lengths, std::uint32_t capacity, std::uint32_t* copy);

struct PackPlan {
  LargeArray<std::int64_t> offsets;  // packs + 1; pack i holds indices[offsets[i]:offsets[i + 1]]
  std::int64_t lower_bound = 0;      // no packing has fewer packs
};

// Writes a permutation of 0..n-1 to `indices` (n = the number of lengths), pack after pack. `indices` may be the memory
// that holds the copied lengths: they are read for the last time before the first index is written. Packs stand in the
// order in which they were opened, and the items of a pack in the order in which they were placed.
//
//   best_fit_decreasing   longest item first, ties by position; into the pack with the least space that still holds it;
//                         of equally full packs the one that has waited longest since an item was put into it
//   first_fit_decreasing  the same order of items; into the first pack that holds it
//   next_fit              shortest item first, ties by position; into the last pack, or a new one
//
// A pack with `max_items` items is closed. Time O(n + groups log groups), where groups <= n counts the sets of
// neighbouring packs that are filled alike; memory O(n), whatever the capacity.
PackPlan plan_packs(const CheckedLengths& lengths, std::uint32_t capacity, Algorithm algorithm, std::uint32_t max_items,
                    std::int64_t* indices);

}  // namespace codeact
