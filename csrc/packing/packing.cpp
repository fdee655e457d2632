#include "packing/packing.hpp"

#include <algorithm>
#include <span>
#include <utility>

// Three observations make this fast and keep it exact.
//
// 1. Items of one length are a *run* and need no decision each. Under best fit the pack that takes an item has then
// even
//    less space, so it stays the best fit and goes on until it holds no more: it takes space / length items in a row.
//    Under first fit the first pack stays the first.
// 2. Neighbouring packs of equal space take the run alike, so one *group* of packs is handled in one step.
//    1,000,000 lengths of mean 450 into 2048 need about 10^4 steps, not 10^6.
// 3. Run lengths only fall. A pack with too little space for this run waits for the one run, known beforehand, whose
//    length is the first to fit. So no search structure over the capacity is needed: packs *wait* in a list per run
//    and are *ready* from that run on. For best fit the ready packs form a stack: whoever becomes ready now has less
//    space than all who were ready before. For first fit they are a heap by pack number.

namespace codeact {
namespace {

// Packs first .. first + size - 1, all with the same space left and the same number of items still allowed.
struct Group {
  std::uint32_t first;
  std::uint32_t size;
  std::uint32_t space;
  std::uint32_t room;
};

// The next packs * items_each items, in order: `items_each` to pack `first`, then as many to the pack after it, ...
struct Placement {
  std::uint32_t first;
  std::uint32_t packs;
  std::uint32_t items_each;
};

// The largest of: tokens / capacity; items / max_items; and Martello and Toth's bound L2. L2, for a smallest length
// `small`: items over half the capacity need a pack each; those that leave less than `small` share it with no item of
// small..capacity/2; what the other big items leave is all that such items can use for free.
std::int64_t lower_bound(std::span<const Run> runs, std::int64_t items, std::int64_t tokens, std::int64_t capacity,
                         std::int64_t max_items) {
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); };
  std::int64_t big = 0;           // items over half the capacity
  std::int64_t shared_space = 0;  // what those of them leave that leave space for an item of length `small`
  std::int64_t small_tokens = tokens;
  std::size_t half = 0;
  for (; half < runs.size() && 2 * std::int64_t{runs[half].length} > capacity; ++half) {
    big += runs[half].count;
    shared_space += (capacity - runs[half].length) * runs[half].count;
    small_tokens -= std::int64_t{runs[half].length} * runs[half].count;
  }
  std::int64_t bound = std::max({big, ceil_div(tokens, capacity), ceil_div(items, max_items)});
  std::size_t longest_shared = 0;
  for (std::size_t i = runs.size(); i-- > half;) {
    const std::int64_t small = runs[i].length;
    for (; longest_shared < half && runs[longest_shared].length > capacity - small; ++longest_shared) {
      shared_space -= (capacity - runs[longest_shared].length) * runs[longest_shared].count;
    }
    if (small_tokens > shared_space) bound = std::max(bound, big + ceil_div(small_tokens - shared_space, capacity));
    small_tokens -= small * runs[i].count;
  }
  return bound;
}

// Which run is the first (the longest) that a given space holds? Lengths fall, so this is a search in a sorted array;
// a table over the high bits of the space leaves few candidates, and exactly one where all bits fit the table.
class RunFinder {
 public:
  explicit RunFinder(std::span<const Run> runs) : runs_(runs) {
    const std::uint32_t longest = runs.front().length;
    const std::size_t table_size = std::max<std::size_t>(4096, 4 * runs.size());
    while ((longest >> shift_) >= table_size) ++shift_;
    first_.resize((longest >> shift_) + 1);
    std::size_t run = runs.size();
    for (std::size_t high = 0; high < first_.size(); ++high) {
      while (run > 0 && (runs[run - 1].length >> shift_) <= high) --run;
      first_[high] = static_cast<std::uint32_t>(run);
    }
  }

  // `space` is below the longest length. The number of runs where no run fits.
  std::size_t operator()(std::uint32_t space) const {
    const std::size_t high = space >> shift_;
    std::size_t low = first_[high];
    if (shift_ == 0) return low;
    const std::size_t end = high > 0 ? first_[high - 1] : runs_.size();
    const auto begin = runs_.begin();
    return static_cast<std::size_t>(std::partition_point(begin + static_cast<std::ptrdiff_t>(low),
                                                         begin + static_cast<std::ptrdiff_t>(end),
                                                         [space](const Run& run) { return run.length > space; }) -
                                    begin);
  }

 private:
  std::span<const Run> runs_;
  LargeArray<std::uint32_t> first_;  // first_[h]: the first run whose length has high bits <= h
  int shift_ = 0;
};

// One list of groups per run, newest group first. Nodes are reused, so memory follows the groups that wait now.
class WaitingGroups {
 public:
  explicit WaitingGroups(std::size_t runs) : head_(runs, kNone) {}

  void add(std::size_t run, const Group& group) {
    std::uint32_t& head = head_[run];
    if (head != kNone) {
      Group& newest = nodes_[head].group;
      // Neighbours that came here one after the other stay one group, which keeps groups few.
      if (newest.first + newest.size == group.first && newest.space == group.space && newest.room == group.room) {
        newest.size += group.size;
        return;
      }
    }
    std::uint32_t node = free_;
    if (node == kNone) {
      node = static_cast<std::uint32_t>(nodes_.size());
      nodes_.push_back({group, head});
    } else {
      free_ = nodes_[node].next;
      nodes_[node] = {group, head};
    }
    head = node;
  }

  // Appends the groups that wait for `run` to `groups`, newest first.
  void take(std::size_t run, LargeArray<Group>& groups) {
    for (std::uint32_t node = head_[run]; node != kNone;) {
      groups.push_back(nodes_[node].group);
      const std::uint32_t next = std::exchange(nodes_[node].next, free_);
      free_ = std::exchange(node, next);
    }
  }

 private:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
  struct Node {
    Group group;
    std::uint32_t next;
  };
  LargeArray<std::uint32_t> head_;
  LargeArray<Node> nodes_;
  std::uint32_t free_ = kNone;
};

// Best fit: the ready group with the least space, of equal ones that which waits longest, is on top.
struct LeastSpaceFirst {
  LargeArray<Group> groups;

  bool empty() const { return groups.empty(); }
  void push(const Group& group) { groups.push_back(group); }
  Group pop() {
    const Group group = groups.back();
    groups.pop_back();
    return group;
  }
  // Groups that become ready have space for this run and not for the one before: less than any group in the stack.
  // They come newest first; a stable sort keeps that order among equals, which puts the oldest on top.
  void add_ready(WaitingGroups& waiting, std::size_t run) {
    const auto old_size = static_cast<std::ptrdiff_t>(groups.size());
    waiting.take(run, groups);
    const auto more_space = [](const Group& a, const Group& b) { return a.space > b.space; };
    // Where lengths are dense all these spaces are equal, and stable_sort would allocate for nothing.
    if (!std::is_sorted(groups.begin() + old_size, groups.end(), more_space))
      std::stable_sort(groups.begin() + old_size, groups.end(), more_space);
  }
};

// First fit: the ready group with the lowest pack number is on top of a heap.
struct LowestPackFirst {
  LargeArray<Group> groups;
  static bool later(const Group& a, const Group& b) { return a.first > b.first; }

  bool empty() const { return groups.empty(); }
  void push(const Group& group) {
    groups.push_back(group);
    std::push_heap(groups.begin(), groups.end(), later);
  }
  Group pop() {
    std::pop_heap(groups.begin(), groups.end(), later);
    const Group group = groups.back();
    groups.pop_back();
    return group;
  }
  void add_ready(WaitingGroups& waiting, std::size_t run) {
    auto heap_size = static_cast<std::ptrdiff_t>(groups.size());
    waiting.take(run, groups);
    while (heap_size < static_cast<std::ptrdiff_t>(groups.size()))
      std::push_heap(groups.begin(), groups.begin() + ++heap_size, later);
  }
};

// All placements in item order; `packs` gets the number of packs.
template <class ReadyGroups>
LargeArray<Placement> place_runs(std::span<const Run> runs, std::uint32_t capacity, std::uint32_t max_items,
                                 std::uint32_t& packs) {
  LargeArray<Placement> placements;
  const RunFinder run_for(runs);
  WaitingGroups waiting(runs.size());
  ReadyGroups ready;
  // Without a limit `room` stays as it is: counted down, it would tell apart groups that could be joined.
  const std::uint32_t counted = max_items == kNoItemLimit ? 0 : 1;

  for (std::size_t r = 0; r < runs.size(); ++r) {
    const std::uint32_t length = runs[r].length;
    std::uint32_t left = runs[r].count;
    ready.add_ready(waiting, r);
    while (left > 0) {
      Group group;
      if (ready.empty()) {
        const std::uint32_t each = std::min(capacity / length, max_items);
        group = {packs, left / each + (left % each != 0), capacity, max_items};
        packs += group.size;
      } else {
        group = ready.pop();
      }
      const std::uint32_t each = std::min(group.space / length, group.room);
      const std::uint32_t full = std::min(group.size, left / each);
      if (full > 0) {
        placements.push_back({group.first, full, each});
        left -= full * each;
        const std::uint32_t space = group.space - each * length;
        if (group.room > each) {  // so `space` holds no further item of this run
          const std::size_t next_run = run_for(space);
          if (next_run < runs.size()) waiting.add(next_run, {group.first, full, space, group.room - counted * each});
        }
        group.first += full;
        group.size -= full;
      }
      if (group.size == 0) continue;
      // The run ends inside this group: `left` items, fewer than `each`, for its next pack; the others stay as they
      // are.
      const Group begun{group.first, 1, group.space - left * length, group.room - counted * left};
      if (left > 0) {
        placements.push_back({group.first, 1, left});
        left = 0;
        ++group.first;
        --group.size;
      }
      if (group.size > 0) ready.push(group);
      if (begun.first < group.first) ready.push(begun);  // last, as it has less space than any ready group
    }
  }
  return placements;
}

// Where each pack starts, moved up by one place: [0, start of pack 0, start of pack 1, ...]. Writing moves every start
// on to the end of its pack, which makes them the offsets.
LargeArray<std::int64_t> starts_of(std::span<const Placement> placements, std::uint32_t packs) {
  // First by how much each pack's number of items differs from the pack's before it, as a placement covers many packs.
  LargeArray<std::int64_t> starts(packs + std::size_t{1}, 0);
  for (const Placement& placement : placements) {
    starts[placement.first] += placement.items_each;
    starts[placement.first + placement.packs] -= placement.items_each;
  }
  std::int64_t start = 0;
  std::int64_t size = 0;
  std::int64_t difference = std::exchange(starts[0], 0);
  for (std::size_t pack = 0; pack < packs; ++pack) {
    size += difference;
    difference = std::exchange(starts[pack + 1], start);
    start += size;
  }
  return starts;
}

LargeArray<std::int64_t> write_decreasing(const SortedItems& sorted, std::uint32_t capacity, Algorithm algorithm,
                                          std::uint32_t max_items, std::int64_t* indices) {
  std::uint32_t packs = 0;
  const LargeArray<Placement> placements = algorithm == Algorithm::best_fit_decreasing
                                               ? place_runs<LeastSpaceFirst>(sorted.runs, capacity, max_items, packs)
                                               : place_runs<LowestPackFirst>(sorted.runs, capacity, max_items, packs);
  LargeArray<std::int64_t> starts = starts_of(placements, packs);
  const std::uint32_t* item = sorted.order.data();
  for (const Placement& placement : placements) {
    std::int64_t* start = starts.data() + placement.first + 1;
    if (placement.items_each == 1) {
      for (std::uint32_t i = 0; i < placement.packs; ++i) indices[start[i]++] = item[i];
      item += placement.packs;
      continue;
    }
    for (std::uint32_t i = 0; i < placement.packs; ++i) {
      for (std::uint32_t k = 0; k < placement.items_each; ++k) indices[start[i] + k] = *item++;
      start[i] += placement.items_each;
    }
  }
  return starts;
}

LargeArray<std::int64_t> write_next_fit(const SortedItems& sorted, std::uint32_t capacity, std::uint32_t max_items,
                                        std::int64_t* indices) {
  LargeArray<std::int64_t> offsets{0};
  std::int64_t written = 0;
  std::uint32_t space = 0;  // of the last pack; none is open yet
  std::uint32_t room = 0;
  // The runs stand longest first; inside a run positions rise, so whole runs are taken from the back.
  const std::uint32_t* run_end = sorted.order.data();
  for (const Run& run : sorted.runs) run_end += run.count;
  for (std::size_t r = sorted.runs.size(); r-- > 0;) {
    const auto [length, count] = sorted.runs[r];
    run_end -= count;
    std::copy_n(run_end, count, indices + written);  // packs follow each other, so the run stays in one piece
    for (std::uint32_t left = count; left > 0;) {
      if (space < length || room == 0) {
        if (written > 0) offsets.push_back(written);
        space = capacity;
        room = max_items;
      }
      const std::uint32_t taken = std::min({left, space / length, room});
      written += taken;
      left -= taken;
      space -= taken * length;
      room -= taken;
    }
  }
  if (written > 0) offsets.push_back(written);
  return offsets;
}

}  // namespace

PackPlan plan_packs(const CheckedLengths& lengths, std::uint32_t capacity, Algorithm algorithm, std::uint32_t max_items,
                    std::int64_t* indices) {
  if (lengths.values.empty()) return {.offsets = {0}};
  const SortedItems sorted = sort_longest_first(lengths);
  const auto items = static_cast<std::int64_t>(lengths.values.size());
  std::int64_t tokens = 0;
  for (const Run& run : sorted.runs) tokens += std::int64_t{run.length} * run.count;
  const std::int64_t bound = lower_bound(sorted.runs, items, tokens, capacity, max_items);
  return {.offsets = algorithm == Algorithm::next_fit
                         ? write_next_fit(sorted, capacity, max_items, indices)
                         : write_decreasing(sorted, capacity, algorithm, max_items, indices),
          .tokens = tokens,
          .lower_bound = bound};
}

}  // namespace codeact
