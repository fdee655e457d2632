// A randomised self-check of csrc/packing/sorting.cpp and packing.cpp without Python, to be run under address and
// undefined-behaviour sanitizers (CMake option CODEACT_SANITIZE). It checks what tests/packing/test_packs.py checks at
// speed: every item once, no pack over capacity, and the same packs as a plain O(items * packs) rendering of the
// algorithms.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "packing/packing.hpp"

namespace {

using codeact::Algorithm;
using Packs = std::vector<std::vector<std::int64_t>>;

struct Problem {
  std::vector<std::int64_t> lengths;
  std::uint32_t capacity;
  std::uint32_t max_items;
};

void require(bool condition, const char* what, const Problem& problem) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s (capacity %u, max_items %u, lengths", what, problem.capacity, problem.max_items);
  for (const std::int64_t length : problem.lengths) std::fprintf(stderr, " %lld", static_cast<long long>(length));
  std::fprintf(stderr, ")\n");
  std::exit(1);
}

Packs reference(const Problem& problem, Algorithm algorithm) {
  struct Pack {
    std::int64_t space;
    std::size_t last_placed = 0;
    std::vector<std::int64_t> items = {};
  };
  const bool next_fit = algorithm == Algorithm::next_fit;
  std::vector<std::int64_t> order(problem.lengths.size());
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](std::int64_t item) { return problem.lengths[static_cast<std::size_t>(item)]; };
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return next_fit ? length(a) < length(b) : length(a) > length(b);
  });
  std::vector<Pack> packs;
  for (std::size_t step = 0; step < order.size(); ++step) {
    const std::int64_t item = order[step];
    Pack* chosen = nullptr;
    for (Pack& pack : packs) {
      if (pack.space < length(item) || pack.items.size() >= problem.max_items) continue;
      if (next_fit && &pack != &packs.back()) continue;
      const bool better =
          chosen == nullptr || (algorithm == Algorithm::best_fit_decreasing &&
                                std::tie(pack.space, pack.last_placed) < std::tie(chosen->space, chosen->last_placed));
      if (better) chosen = &pack;
    }
    if (chosen == nullptr) chosen = &packs.emplace_back(Pack{.space = problem.capacity});
    chosen->items.push_back(item);
    chosen->space -= length(item);
    chosen->last_placed = step;
  }
  Packs result;
  for (const Pack& pack : packs) result.push_back(pack.items);
  return result;
}

// The lengths as T, every `stride` bytes, from an odd address: what numpy may hand over.
template <class T>
codeact::CheckedLengths checked_as(const Problem& problem, std::size_t stride, std::vector<std::byte>& memory,
                                   std::vector<std::uint32_t>& copy) {
  memory.assign(problem.lengths.size() * stride + 1, std::byte{0xff});
  copy.resize(problem.lengths.size());
  for (std::size_t i = 0; i < problem.lengths.size(); ++i) {
    const T value = static_cast<T>(problem.lengths[i]);
    std::memcpy(memory.data() + 1 + i * stride, &value, sizeof(T));
  }
  return codeact::check_lengths({.data = memory.data() + 1,
                                 .size = static_cast<std::int64_t>(problem.lengths.size()),
                                 .stride = static_cast<std::int64_t>(stride),
                                 .item_bytes = sizeof(T),
                                 .is_signed = std::is_signed_v<T>},
                                problem.capacity, copy.data());
}

void check(const Problem& problem, const codeact::CheckedLengths& lengths, bool compare) {
  for (const Algorithm algorithm :
       {Algorithm::best_fit_decreasing, Algorithm::first_fit_decreasing, Algorithm::next_fit}) {
    std::vector<std::int64_t> indices(problem.lengths.size(), -1);
    const codeact::PackPlan plan =
        codeact::plan_packs(lengths, problem.capacity, algorithm, problem.max_items, indices.data());
    require(plan.offsets.front() == 0, "the first offset is 0", problem);
    require(plan.offsets.back() == static_cast<std::int64_t>(indices.size()), "the last offset is n", problem);
    require(plan.lower_bound <= static_cast<std::int64_t>(plan.offsets.size()) - 1, "the bound holds", problem);
    std::vector<bool> seen(indices.size());
    Packs packs;
    for (std::size_t pack = 0; pack + 1 < plan.offsets.size(); ++pack) {
      const auto begin = static_cast<std::size_t>(plan.offsets[pack]);
      const auto end = static_cast<std::size_t>(plan.offsets[pack + 1]);
      require(begin < end && end - begin <= problem.max_items, "1..max_items items in a pack", problem);
      std::int64_t tokens = 0;
      for (std::size_t i = begin; i < end; ++i) {
        const auto item = static_cast<std::size_t>(indices[i]);
        require(item < seen.size() && !seen[item], "every item once", problem);
        seen[item] = true;
        tokens += problem.lengths[item];
      }
      require(tokens <= problem.capacity, "no pack over capacity", problem);
      if (compare) packs.emplace_back(indices.data() + begin, indices.data() + end);
    }
    if (compare) require(packs == reference(problem, algorithm), "the reference's packs", problem);
  }
}

void check_refusals() {
  const auto message = [](std::vector<std::int64_t> lengths) -> std::string {
    std::vector<std::byte> memory;
    std::vector<std::uint32_t> copy;
    try {
      checked_as<std::int64_t>({std::move(lengths), 10, codeact::kNoItemLimit}, 8, memory, copy);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  const Problem none{{}, 10, codeact::kNoItemLimit};
  require(message({1, 10}).empty(), "good lengths pass", none);
  require(message({1, 11}).starts_with("lengths[1] is 11, over the capacity 10"), "too long", none);
  require(message({0, 11}).starts_with("lengths[0] is 0;"), "zero", none);
  require(message({1, INT64_MIN}).starts_with("lengths[1] is -9223372036854775808;"), "negative", none);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3000;
  std::mt19937_64 random(20240607);
  const auto below = [&](std::uint64_t limit) { return random() % limit; };
  check_refusals();
  const std::uint32_t capacities[] = {1, 2, 10, 40, 100, 127, 2048, 70'000, 3'000'000, 0x7fffffff};
  std::vector<std::byte> memory;
  std::vector<std::uint32_t> copy;
  for (int round = 0; round < rounds; ++round) {
    const std::uint32_t capacity = capacities[below(std::size(capacities))];
    const std::uint64_t longest = below(2) ? capacity : 1 + below(capacity);  // sometimes many items fit a pack
    const std::uint64_t kinds = 1 + below(50);                                // sometimes few different lengths
    Problem problem{{}, capacity, below(2) ? codeact::kNoItemLimit : static_cast<std::uint32_t>(1 + below(9))};
    for (std::uint64_t i = below(120); i > 0; --i)
      problem.lengths.push_back(static_cast<std::int64_t>(1 + (longest - 1) * below(kinds) / kinds));
    check(problem, checked_as<std::int64_t>(problem, 8 + below(9), memory, copy), true);
    check(problem, checked_as<std::uint32_t>(problem, 4 + below(3), memory, copy), true);
    if (capacity <= 127) check(problem, checked_as<std::int8_t>(problem, 1 + below(3), memory, copy), true);
  }
  for (const std::uint32_t capacity : {2048U, 131'072U, 0x7fffffffU}) {  // large arrays: huge pages, growing storage
    Problem problem{{}, capacity, codeact::kNoItemLimit};
    for (int i = 0; i < 400'000; ++i) problem.lengths.push_back(static_cast<std::int64_t>(1 + below(capacity)));
    check(problem, checked_as<std::int64_t>(problem, 8, memory, copy), false);
  }
  std::printf("packing: %d random problems and 3 large ones passed\n", rounds);
}
