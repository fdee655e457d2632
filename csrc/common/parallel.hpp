// Work shared among threads that live for one call: no pool that waits, none that is shared with other callers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace codeact {

// Threads worth starting for so many multiplications; to start one takes as long as a million.
inline int worthwhile_threads(double multiplications, int most) {
  return static_cast<int>(std::clamp<double>(multiplications / 4e6, 1, std::max(most, 1)));
}

// Calls run(thread, item) for every item, on the caller's thread and `threads` - 1 others.
template <class Run>
void share(int threads, std::int64_t items, const Run& run) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(thread, item);
  };
  // std::jthread would join by itself; the libc++ of Xcode 16 and older lacks it.
  struct Threads : std::vector<std::thread> {
    ~Threads() {
      for (std::thread& thread : *this) thread.join();
    }
  } others;
  others.reserve(static_cast<std::size_t>(threads));
  try {
    for (int thread = 1; thread < std::min<std::int64_t>(threads, items); ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do it all.
  }
  work(0);
}

}  // namespace codeact
