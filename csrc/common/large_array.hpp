// A std::vector for large plain data: left uninitialised, and on huge pages where the system has them.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace codeact {

#ifdef __linux__
// Whole huge pages from the system. The last mapping given back of each size up to 4 pages is kept for the next call,
// as the system takes 0.05-0.1 ms to zero a fresh one, a tenth of the time of packing a million items for three: 20 MB
// at most, and marked free, so that the system takes the pages back when it is short of memory.
class HugePages {
 public:
  static constexpr std::size_t kBytes = std::size_t{1} << 21;

  static void* take(std::size_t pages) {
    if (pages <= kept.size()) {
      if (void* memory = kept[pages - 1].exchange(nullptr)) return memory;
    }
    void* memory = mmap(nullptr, pages * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, pages * kBytes, MADV_HUGEPAGE);  // advice: where it is refused, the memory is still good
    return memory;
  }

  static void give_back(void* memory, std::size_t pages) noexcept {
    if (pages <= kept.size()) {
      madvise(memory, pages * kBytes, MADV_FREE);
      memory = kept[pages - 1].exchange(memory);
    }
    if (memory != nullptr) munmap(memory, pages * kBytes);
  }

 private:
  static inline std::array<std::atomic<void*>, 4> kept{};
};
#endif

// Packing a million items is memory-bound: touching fresh 4 KB pages takes half the time (1-2.5 us each on a virtual
// machine), and zeroing what is then overwritten is a pass for nothing. numpy asks for huge pages in the same way.
// Mapped, not taken from the heap: the heap's end is cut back on every free, which splits its huge pages.
template <class T>
struct LargeArrayAllocator {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);
  using value_type = T;

  LargeArrayAllocator() = default;
  template <class U>
  LargeArrayAllocator(const LargeArrayAllocator<U>&) noexcept {}

  T* allocate(std::size_t count) {
    if (count > static_cast<std::size_t>(-1) / 2 / sizeof(T)) throw std::bad_array_new_length();
    const std::size_t bytes = count * sizeof(T);
#ifdef __linux__
    if (bytes >= kLarge) return static_cast<T*>(HugePages::take(pages(bytes)));
#endif
    return static_cast<T*>(::operator new(bytes, kLine));
  }

  void deallocate(T* memory, [[maybe_unused]] std::size_t count) noexcept {
#ifdef __linux__
    if (count * sizeof(T) >= kLarge) {
      HugePages::give_back(memory, pages(count * sizeof(T)));
      return;
    }
#endif
    ::operator delete(memory, kLine);
  }

  // Default construction leaves plain data as it is; any other is the usual one.
  template <class U>
  void construct(U* place) noexcept {
    ::new (static_cast<void*>(place)) U;
  }
  template <class U, class... Arguments>
  void construct(U* place, Arguments&&... arguments) {
    ::new (static_cast<void*>(place)) U{std::forward<Arguments>(arguments)...};
  }

  friend bool operator==(const LargeArrayAllocator&, const LargeArrayAllocator&) { return true; }

 private:
  static constexpr std::align_val_t kLine{64};  // of the cache, and the widest vector
#ifdef __linux__
  static constexpr std::size_t kLarge = HugePages::kBytes / 4;  // from here on a huge page costs less than small ones
  static constexpr std::size_t pages(std::size_t bytes) { return (bytes + HugePages::kBytes - 1) / HugePages::kBytes; }
#endif
};

template <class T>
using LargeArray = std::vector<T, LargeArrayAllocator<T>>;

}  // namespace codeact
