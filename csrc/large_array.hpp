// A std::vector for large plain data: left uninitialised, and on huge pages where the system has them.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace codeact {

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
    if (bytes >= kLarge) {
      void* memory = mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      madvise(memory, rounded(bytes), MADV_HUGEPAGE);  // advice: where it is refused, the memory is still good
      return static_cast<T*>(memory);
    }
#endif
    return static_cast<T*>(::operator new(bytes, kLine));
  }

  void deallocate(T* memory, std::size_t count) noexcept {
#ifdef __linux__
    if (count * sizeof(T) >= kLarge) {
      munmap(memory, rounded(count * sizeof(T)));
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
  static constexpr std::size_t kHugePage = std::size_t{1} << 21;
  static constexpr std::size_t rounded(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }
  static constexpr std::size_t kLarge = kHugePage / 4;  // from here on one huge page costs less than many small ones
};

template <class T>
using LargeArray = std::vector<T, LargeArrayAllocator<T>>;

}  // namespace codeact
