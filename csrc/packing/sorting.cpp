#include "packing/sorting.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace codeact {
namespace {

template <class T>
T load(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));  // the array may be unaligned
  return value;
}

template <class T>
void require_in_range(T length, std::int64_t position, std::uint32_t capacity) {
  if (length > T{0} && static_cast<std::uint64_t>(length) <= capacity) return;
  const std::string name = "lengths[" + std::to_string(position) + "] is " + std::to_string(length);
  if (length <= T{0}) throw std::invalid_argument(name + "; a length must be at least 1: drop empty items first");
  throw std::invalid_argument(name + ", over the capacity " + std::to_string(capacity) +
                              ": cut or drop the item, or raise the capacity");
}

// Copies `size` lengths and returns whether all are in 1..capacity. Without a branch, so that compilers vectorise it;
// `bits` gets the bits of every length.
template <class T, bool kContiguous>
bool copy_block(const std::byte* data, std::int64_t stride, std::int64_t size, std::uint32_t capacity,
                std::uint32_t* copy, std::uint32_t& bits) {
  // Modulo 2^64 or 2^32, where a length of 0 or below, or over the capacity (below 2^31), sets the top bit of one of
  // the two differences.
  using Word = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;
  Word wrong = 0;
  std::uint32_t all_bits = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const auto length = static_cast<Word>(load<T>(data + i * (kContiguous ? std::int64_t{sizeof(T)} : stride)));
    wrong |= (length - 1) | (capacity - length);
    copy[i] = static_cast<std::uint32_t>(length);
    all_bits |= static_cast<std::uint32_t>(length);
  }
  bits |= all_bits;
  return std::countl_zero(wrong) > 0;
}

template <class T>
CheckedLengths check_lengths_of(const IntegerView& lengths, std::uint32_t capacity, std::uint32_t* copy) {
  constexpr std::int64_t kBlock = 4096;  // a wrong length ends the work soon
  std::uint32_t bits = 0;
  for (std::int64_t start = 0; start < lengths.size; start += kBlock) {
    const std::int64_t size = std::min(kBlock, lengths.size - start);
    const std::byte* data = lengths.data + start * lengths.stride;
    const auto copy_of = lengths.stride == sizeof(T) ? copy_block<T, true> : copy_block<T, false>;
    if (copy_of(data, lengths.stride, size, capacity, copy + start, bits)) [[likely]]
      continue;
    for (std::int64_t i = 0; i < size; ++i) {
      const T length = load<T>(data + i * lengths.stride);
      require_in_range(length, start + i, capacity);
      copy[start + i] = static_cast<std::uint32_t>(length);  // it was wrong a moment ago: another thread writes to it
      bits |= copy[start + i];
    }
  }
  const auto limit = static_cast<std::uint32_t>((std::uint64_t{1} << std::bit_width(bits)) - 1);
  return {.values = {copy, static_cast<std::size_t>(lengths.size)}, .limit = std::min(limit, capacity)};
}

SortedItems counting_sort(const CheckedLengths& lengths) {
  const auto values = lengths.values;
  const std::size_t size = values.size();
  LargeArray<std::uint32_t> next(lengths.limit + std::size_t{1}, 0);  // first the counts, then where the next item goes
  LargeArray<std::uint32_t> odd_counts(next);  // a second counter: lengths that follow each other need not wait
  for (std::size_t i = 0; i + 1 < size; i += 2) {
    ++next[values[i]];
    ++odd_counts[values[i + 1]];
  }
  if (size % 2 != 0) ++next[values[size - 1]];
  SortedItems sorted;
  std::uint32_t start = 0;
  for (std::uint32_t length = lengths.limit; length > 0; --length) {
    const std::uint32_t count = next[length] + odd_counts[length];
    next[length] = start;
    start += count;
    if (count > 0) sorted.runs.push_back({length, count});
  }
  sorted.order.resize(
      size, 0);  // touched in order first: a scatter into memory that no cache holds takes three times as long
  std::uint32_t* order = sorted.order.data();
  for (std::size_t i = 0; i < size; ++i) order[next[values[i]]++] = static_cast<std::uint32_t>(i);
  return sorted;
}

// Least significant digit first, for lengths too spread out to count each one.
SortedItems radix_sort(const CheckedLengths& lengths) {
  constexpr int kDigitBits = 11;  // 2048 counters and 2048 open cache lines: both fit a 32 KB + 1 MB cache
  constexpr std::uint32_t kDigits = 1U << kDigitBits;
  const std::size_t size = lengths.values.size();
  LargeArray<std::uint64_t> items(size);  // length in the high half, position in the low half
  LargeArray<std::uint64_t> scratch(size);
  for (std::size_t i = 0; i < size; ++i) items[i] = std::uint64_t{lengths.values[i]} << 32 | i;

  for (int shift = 32; shift < 32 + static_cast<int>(std::bit_width(lengths.limit)); shift += kDigitBits) {
    std::array<std::uint32_t, kDigits> next{};
    for (std::size_t i = 0; i < size; ++i) ++next[(items[i] >> shift) % kDigits];
    std::uint32_t start = 0;
    for (std::uint32_t digit = kDigits; digit-- > 0;) start += std::exchange(next[digit], start);
    for (std::size_t i = 0; i < size; ++i) scratch[next[(items[i] >> shift) % kDigits]++] = items[i];
    std::swap(items, scratch);
  }
  scratch = {};

  SortedItems sorted;
  sorted.order.resize(size);
  for (std::size_t i = 0; i < size; ++i) {
    sorted.order[i] = static_cast<std::uint32_t>(items[i]);
    const auto length = static_cast<std::uint32_t>(items[i] >> 32);
    if (sorted.runs.empty() || sorted.runs.back().length != length) sorted.runs.push_back({length, 0});
    ++sorted.runs.back().count;
  }
  return sorted;
}

}  // namespace

CheckedLengths check_lengths(const IntegerView& lengths, std::uint32_t capacity, std::uint32_t* copy) {
  switch (lengths.item_bytes) {
    case 1:
      return lengths.is_signed ? check_lengths_of<std::int8_t>(lengths, capacity, copy)
                               : check_lengths_of<std::uint8_t>(lengths, capacity, copy);
    case 2:
      return lengths.is_signed ? check_lengths_of<std::int16_t>(lengths, capacity, copy)
                               : check_lengths_of<std::uint16_t>(lengths, capacity, copy);
    case 4:
      return lengths.is_signed ? check_lengths_of<std::int32_t>(lengths, capacity, copy)
                               : check_lengths_of<std::uint32_t>(lengths, capacity, copy);
    case 8:
      return lengths.is_signed ? check_lengths_of<std::int64_t>(lengths, capacity, copy)
                               : check_lengths_of<std::uint64_t>(lengths, capacity, copy);
    default:
      throw std::invalid_argument("lengths must be integers of 1, 2, 4 or 8 bytes");
  }
}

SortedItems sort_longest_first(const CheckedLengths& lengths) {
  // Counters for all lengths, unless that is much memory beside the lengths or past what a cache holds.
  const std::size_t most_counters = std::min<std::size_t>(4 * lengths.values.size() + 4096, 1 << 17);
  return lengths.limit <= most_counters ? counting_sort(lengths) : radix_sort(lengths);
}

}  // namespace codeact
