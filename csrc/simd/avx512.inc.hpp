// Operations on vectors of AVX-512: F, BW, DQ and VL, as every AVX-512 CPU since 2017 has them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace codeact {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  // 24 sums, 3 columns and a row of 32 registers: 11 loads for 24 multiplications, which the CPU does side by side.
  static constexpr int kTileRows = 8;
  static constexpr int kPanelVectors = 3;
  static constexpr bool kPairs = false;

  static Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec load_words(const void* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static void store_words(void* p, Vec x) { _mm512_storeu_si512(p, _mm512_castps_si512(x)); }
  static Vec broadcast_word(const std::uint32_t* p) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)));
  }
  static Vec widen_bfloat16(const void* p) {
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // To nearest, ties to even; a NaN stays one.
  static __m512i high_halves(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  }
  static Vec round_bfloat16(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(high_halves(x), 16)); }
  static void store_bfloat16(void* p, Vec x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high_halves(x)));
  }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }

  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec absolute(Vec a) { return _mm512_abs_ps(a); }
  static Vec copy_sign(Vec size, Vec sign) { return _mm512_or_ps(size, _mm512_and_ps(sign, _mm512_set1_ps(-0.0F))); }
  static Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec scale(Vec a, Vec exponent) { return _mm512_scalef_ps(a, exponent); }
  static bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

  static void transpose(Vec (&x)[kLanes]) {
    Vec y[kLanes];
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
      x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
      x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    }
  }
};

}  // namespace
}  // namespace codeact
