/* The widest vectors on any x86-64 processor: models of the instructions that the C kernels use, an
 * element at a time, as Intel's manual describes them. Included before the kernels.
 *
 * EMULATED_PAIRS: how vdpbf16ps adds the two products of a pair. 0: not at all, the processor has
 * not got it; 1: as described; 2: both at once, as it does not. */
#pragma once
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512VBMI__ 1
#if EMULATED_PAIRS
#define __AVX512BF16__ 1
#endif
#define MODEL static __attribute__((noinline, unused))
#define EACH_OF(n) for (int i = 0; i < (n); i++)

typedef union {
  __m512i whole;
  __m512 floats;
  __m512bh bfloats;
  __m128i quarters[4];
  float f[16];
  int32_t d[16];
  uint32_t u[16];
  uint16_t w[32];
  uint8_t b[64];
} wide;

MODEL __m512 model_fma(__m512 a, __m512 b, __m512 c) {
  wide x = {.floats = a}, y = {.floats = b}, z = {.floats = c};
  EACH_OF(16) z.f[i] = __builtin_fmaf(x.f[i], y.f[i], z.f[i]);
  return z.floats;
}

MODEL __m512i model_load(const void *from) {
  wide x;
  memcpy(&x, from, sizeof x);
  return x.whole;
}

MODEL __m256i model_masked_words(uint32_t mask, const void *from) {
  uint16_t x[16] = {0};
  EACH_OF(16) if (mask >> i & 1) memcpy(x + i, (const uint8_t *)from + 2 * i, 2);
  __m256i loaded;
  memcpy(&loaded, x, sizeof loaded);
  return loaded;
}

MODEL __m128i model_masked_bytes(uint32_t mask, const void *from) {
  uint8_t x[16] = {0};
  EACH_OF(16) if (mask >> i & 1) x[i] = ((const uint8_t *)from)[i];
  __m128i loaded;
  memcpy(&loaded, x, sizeof loaded);
  return loaded;
}

MODEL __m512i model_widened_bytes(__m128i given) {
  uint8_t x[16];
  memcpy(x, &given, sizeof x);
  wide y;
  EACH_OF(16) y.u[i] = x[i];
  return y.whole;
}

MODEL __m512 model_first(const void *from, size_t size) {
  wide x = {.whole = {0}};
  memcpy(&x, from, size);
  return x.floats;
}

MODEL __m512 model_vpermps(__m512i index, __m512 table) {
  wide at = {.whole = index}, from = {.floats = table}, to;
  EACH_OF(16) to.f[i] = from.f[at.u[i] & 15];
  return to.floats;
}

MODEL __m512i model_vpermw(uint32_t mask, __m512i index, __m512i table) {
  wide at = {.whole = index}, from = {.whole = table}, to;
  EACH_OF(32) to.w[i] = mask >> i & 1 ? from.w[at.w[i] & 31] : 0;
  return to.whole;
}

MODEL __m512i model_vpermi2b(__m512i low, __m512i index, __m512i high) {
  wide at = {.whole = index}, a = {.whole = low}, b = {.whole = high}, to;
  EACH_OF(64) to.b[i] = (at.b[i] & 64 ? b : a).b[at.b[i] & 63];
  return to.whole;
}

MODEL __m512i model_vpshufb(__m512i table, __m512i index) {
  wide at = {.whole = index}, from = {.whole = table}, to;
  EACH_OF(64) to.b[i] = at.b[i] & 128 ? 0 : from.b[i / 16 * 16 + (at.b[i] & 15)];
  return to.whole;
}

MODEL __m512i model_interleaved(__m512i first, __m512i second, int from) {
  wide a = {.whole = first}, b = {.whole = second}, to;
  EACH_OF(64) to.b[i] = (i & 1 ? b : a).b[i / 16 * 16 + from + i % 16 / 2];
  return to.whole;
}

MODEL __m512i model_vpternlog(__m512i first, __m512i second, __m512i third, int table) {
  wide a = {.whole = first}, b = {.whole = second}, c = {.whole = third}, to = {.whole = {0}};
  EACH_OF(16)
    for (int k = 0; k < 8; k++)
      if (table >> k & 1)
        to.u[i] |= (k & 4 ? a.u[i] : ~a.u[i]) & (k & 2 ? b.u[i] : ~b.u[i]) &
                   (k & 1 ? c.u[i] : ~c.u[i]);
  return to.whole;
}

MODEL __m512i model_vprold(__m512i given, int right) {
  wide x = {.whole = given};
  EACH_OF(16) x.u[i] = x.u[i] >> (right & 31) | x.u[i] << (-right & 31);
  return x.whole;
}

MODEL uint32_t model_vptestmd(__m512i a, __m512i b) {
  wide x = {.whole = a}, y = {.whole = b};
  uint32_t mask = 0;
  EACH_OF(16) mask |= (uint32_t)((x.u[i] & y.u[i]) != 0) << i;
  return mask;
}

MODEL float model_flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0.f : x; }

MODEL float model_half(uint32_t pair, int high) {
  const uint32_t bits = high ? pair & 0xFFFF0000 : pair << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return model_flushed(x);
}

/* Subnormal numbers are taken for zero, and given as zero. */
MODEL __m512 model_vdpbf16ps(__m512 sums, __m512bh first, __m512bh second) {
  wide to = {.floats = sums}, a = {.bfloats = first}, b = {.bfloats = second};
  EACH_OF(16) {
    const float x[2] = {model_half(a.u[i], 0), model_half(a.u[i], 1)};
    const float y[2] = {model_half(b.u[i], 0), model_half(b.u[i], 1)};
    const float sum = model_flushed(to.f[i]);
#if EMULATED_PAIRS == 2
    to.f[i] = model_flushed((float)((double)x[0] * y[0] + (double)x[1] * y[1] + sum));
#else
    const float one = model_flushed(__builtin_fmaf(x[1], y[1], sum));
    to.f[i] = model_flushed(__builtin_fmaf(x[0], y[0], one));
#endif
  }
  return to.floats;
}

MODEL __m512 model_of_float16(__m256i given) {
  _Float16 x[16];
  memcpy(x, &given, sizeof x);
  wide y;
  EACH_OF(16) y.f[i] = (float)x[i];
  return y.floats;
}

MODEL __m256i model_to_float16(__m512 given) {
  wide x = {.floats = given};
  _Float16 y[16];
  EACH_OF(16) y[i] = (_Float16)x.f[i];
  __m256i rounded;
  memcpy(&rounded, y, sizeof rounded);
  return rounded;
}

#undef _mm512_cvtps_ph
#undef _mm512_ror_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_fmadd_ps model_fma
#define _mm512_load_si512 model_load
#define _mm512_loadu_si512 model_load
#define _mm512_loadu_ps(from) ((__m512)model_load(from))
#define _mm256_maskz_loadu_epi16 model_masked_words
#define _mm_maskz_loadu_epi8 model_masked_bytes
#define _mm512_cvtepu8_epi32 model_widened_bytes
#define _mm512_castps128_ps512(x) ((wide){.quarters = {(__m128i)(x)}}.floats)
#define _mm512_castps256_ps512(x) ({ __m256 half = (x); model_first(&half, sizeof half); })
#define _mm512_permutexvar_ps model_vpermps
#define _mm512_permutexvar_epi16(index, table) model_vpermw(~0u, index, table)
#define _mm512_maskz_permutexvar_epi16 model_vpermw
#define _mm512_permutex2var_epi8 model_vpermi2b
#define _mm512_shuffle_epi8 model_vpshufb
#define _mm512_unpacklo_epi8(a, b) model_interleaved(a, b, 0)
#define _mm512_unpackhi_epi8(a, b) model_interleaved(a, b, 8)
#define _mm512_ternarylogic_epi32 model_vpternlog
#define _mm512_broadcast_i32x4(x) ((wide){.quarters = {x, x, x, x}}.whole)
#define _mm512_set1_epi8(x) ((__m512i)(((uint8_t __attribute__((vector_size(64)))){0}) + (uint8_t)(x)))
#define _mm512_ror_epi32 model_vprold
#define _mm512_test_epi32_mask model_vptestmd
#define _mm512_cvtph_ps(x) model_of_float16(x)
#define _mm512_cvtps_ph(x, how) model_to_float16(x)
#define _mm512_dpbf16_ps model_vdpbf16ps
