// Lengths -> packs of at most `capacity` tokens. No Python types here; see bindings.cpp for those.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "common/large_array.hpp"
#include "packing/sorting.hpp"

namespace codeact {

enum class Algorithm { best_fit_decreasing, first_fit_decreasing, next_fit };

// Items and capacity are held in 32 bits inside: half the memory traffic, and it is what a GPU's position ids can hold.
inline constexpr std::int64_t kMaxCapacity = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int64_t kMaxItems = std::int64_t{1} << 31;
inline constexpr std::uint32_t kNoItemLimit = std::numeric_limits<std::uint32_t>::max();

struct PackPlan {
  LargeArray<std::int64_t> offsets;  // packs + 1; pack i holds indices[offsets[i]:offsets[i + 1]]
  std::int64_t tokens = 0;           // sum of all lengths
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
