// The most multiply-adds a second, each counted as two operations, that the cores do together: independent sums in
// registers, no memory. Usage: matmul_peak THREADS; prints a line a dtype, "float32 1e11", bfloat16 where there is
// some.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kSums = 24;  // enough to hide the latency, few enough for the registers
static Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Vec = __m256;
constexpr int kSums = 12;
static Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);
constexpr long kRounds = 20'000'000;

template <class Step>
void work(Step step) {
  Vec sums[kSums];
  Vec a = {}, b = {};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    sums[i] = a;
    asm volatile("" : "+x"(sums[i]));  // or equal sums would be made but once
  }
  for (long round = 0; round < kRounds; ++round) {
    asm volatile("" : "+x"(a), "+x"(b));  // new ones for all that the compiler knows
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = step(a, b, sums[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) asm volatile("" : : "x"(sums[i]));
}

template <class Step>
void report(const char* name, int threads, int products, Step step) {
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i) all.emplace_back([&] { work(step); });
    for (std::thread& one : all) one.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = 2.0 * products * kSums * kRounds * threads / seconds;
    best = rate > best ? rate : best;
  }
  std::printf("%s %.4g\n", name, best);
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
#if defined(__AVX512BF16__)
  report("bfloat16", threads, 2 * kLanes, [](Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  });
#endif
  report("float32", threads, kLanes, [](Vec a, Vec b, Vec c) { return fused(a, b, c); });
}
