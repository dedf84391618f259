/* Vectors of lanes: as wide as the machine's, and no wider than the fewest lanes of a sum. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(__FMA__) && !defined(__aarch64__) && !defined(__FP_FAST_FMAF)
#error "this processor has no fused multiply-add"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && FEWEST_LANES >= 16
#define VEC 16
#elif defined(__AVX2__) && FEWEST_LANES >= 8
#define VEC 8
#else
#define VEC 4
#endif

typedef float vec __attribute__((vector_size(4 * VEC)));
typedef uint32_t words __attribute__((vector_size(4 * VEC)));
typedef int32_t ints __attribute__((vector_size(4 * VEC)));
typedef uint16_t halves __attribute__((vector_size(2 * VEC)));
typedef uint8_t bytes __attribute__((vector_size(VEC)));
#define MOST_IN_A_STEP 16
#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float x) { return x - (vec){}; }

INLINE words splat_word(uint32_t x) { return x - (words){}; }

/* Of each element `yes` where all bits of `which` are set, `no` where none is. */
INLINE words chosen(ints which, words yes, words no) {
  return ((words)which & yes) | (~(words)which & no);
}

/* a * b + c, rounded once. */
INLINE vec fused(vec a, vec b, vec c) {
#if VEC == 16
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VEC == 8
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
  return (vec)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
  vec sum;
  for (int i = 0; i < VEC; i++) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

/* `many` bytes into a whole vector, zeros behind them. */
#define LOAD(TYPE, from, many)                              \
  ({                                                        \
    TYPE loaded = {};                                       \
    if ((many) >= (long)sizeof(TYPE))                       \
      memcpy(&loaded, (from), sizeof(TYPE));                \
    else if ((many) > 0)                                    \
      memcpy(&loaded, (from), (size_t)(many));              \
    loaded;                                                 \
  })

/* Up to VEC halves, zeros behind them; and bytes. Not by way of memory, where that can be. */
INLINE halves load_halves(const uint8_t *from, long many) {
#if VEC == 16
  return (halves)_mm256_maskz_loadu_epi16((__mmask16)(many < 16 ? (1u << many) - 1 : 0xFFFF), from);
#else
  return LOAD(halves, from, 2 * many);
#endif
}

INLINE bytes load_bytes(const uint8_t *from, long many) {
#if VEC == 16
  return (bytes)_mm_maskz_loadu_epi8((__mmask16)(many < 16 ? (1u << many) - 1 : 0xFFFF), from);
#else
  return LOAD(bytes, from, many);
#endif
}

INLINE vec load_floats(const float *from) {
  vec loaded;
  memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

/* Element i of the result is element from[i] of low and high side by side. */
INLINE words picked(words low, words high, words from) {
#if defined(__clang__)
  words result;
  for (int i = 0; i < VEC; i++) result[i] = from[i] < VEC ? low[from[i]] : high[from[i] - VEC];
  return result;
#else
  return __builtin_shuffle(low, high, from);
#endif
}

#if VEC == 16
#define INDICES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif VEC == 8
#define INDICES {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define INDICES {0, 1, 2, 3}
#endif

/* Of groups of `group` elements, every other one: the first of each two, or the second. */
INLINE words every_other(words low, words high, uint32_t group, uint32_t second) {
  const words i = INDICES;
  return picked(low, high, i / group * (2 * group) + i % group + second * group);
}

/* Each element repeated so many times, from element `first` on. */
INLINE vec repeated(vec x, uint32_t times, uint32_t first) {
  const words i = INDICES;
  return (vec)picked((words)x, (words)x, i / times + first);
}

/* As many floats as it takes, each repeated so many times. */
INLINE vec spread_out(const float *few, int times) {
#if VEC == 16
  if (times == 4)
    return repeated((vec)_mm512_castps128_ps512(_mm_loadu_ps(few)), 4, 0);
  if (times == 2)
    return repeated((vec)_mm512_castps256_ps512(_mm256_loadu_ps(few)), 2, 0);
#elif VEC == 8 /* no wider loads than that: they would wait for several stores before them */
  if (times == 4)
    return (vec)_mm256_permutevar_ps(
        (__m256)_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)few)),
        _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  if (times == 2)
    return (vec)_mm256_permutevar_ps((__m256)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)few)),
                                     _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
#endif
  return repeated(load_floats(few), (uint32_t)times, 0);
}

/* The entry of a table at the low four bits of each index; entry 8 + i is entry i negated. */
INLINE vec looked_up(const float *table, words index) {
#if VEC == 16
  return (vec)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif VEC == 8
  vec found = (vec)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  return (vec)((words)found | (index << 28 & 0x80000000));
#else
  vec found;
  for (int i = 0; i < VEC; i++) found[i] = table[index[i] & 15];
  return found;
#endif
}

#if VEC == 16
/* The element of a vector at the low four bits of each index. */
INLINE vec taken(vec elements, words index) {
  return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)elements);
}

/* The bfloat16 at bits 16 to 19 of each index, of a table of sixteen that is there twice: a fifth
 * bit, which is another's, makes no difference. */
INLINE vec looked_up_above(const uint16_t *table, words index) {
  return (vec)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)index, _mm512_load_si512(table));
}
#endif

/* Rounded to float16, to the nearest, ties to even. */
INLINE vec rounded_to_float16(vec x) {
#if VEC == 16
  return (vec)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif VEC == 8 && defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VEC; i++) x[i] = (float)(_Float16)x[i];
  return x;
#endif
}

/* With one NaN in place of all, whose low bits are not set. */
INLINE vec without_payload(vec x) {
  return (vec)chosen(x != x, splat_word(0x7FC00000), (words)x);
}

/* Rounded to bfloat16, to the nearest, ties to even. A NaN must not have its low bits set. */
INLINE vec rounded(vec x) {
  words bits = (words)x;
  return (vec)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

INLINE vec widened(halves x) { return (vec)(__builtin_convertvector(x, words) << 16); }

INLINE int any_of(ints which) {
#if VEC == 16
  return _mm512_test_epi32_mask((__m512i)which, (__m512i)which) != 0;
#elif VEC == 8
  return !_mm256_testz_si256((__m256i)which, (__m256i)which);
#else
  int any = 0;
  for (int i = 0; i < VEC; i++) any |= which[i];
  return any;
#endif
}

INLINE words widened_bytes(bytes x) {
#if VEC == 16 /* convertvector takes byte by byte in gcc 12 */
  return (words)_mm512_cvtepu8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, words);
#endif
}

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE float of_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7FFF;
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Groups of elements, `stride` each, in `count` vectors (both powers of two, stride < VEC): vector k
 * of the result has every count-th group, from the k-th on. */
INLINE void dealt(words *groups, int stride, int count) {
  /* groups[q * width + v]: vector v of the groups whose number is q modulo `have` */
#pragma GCC unroll 4
  for (int have = 1; have < count; have *= 2) {
    const int half = count / have / 2;
    words next[MOST_IN_A_STEP];
#pragma GCC unroll 16
    for (int q = 0; q < have; q++) {
#pragma GCC unroll 16
      for (int v = 0; v < half; v++) {
        words low = groups[(q * half + v) * 2], high = groups[(q * half + v) * 2 + 1];
        next[q * half + v] = every_other(low, high, (uint32_t)stride, 0);
        next[(q + have) * half + v] = every_other(low, high, (uint32_t)stride, 1);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < count; k++) groups[k] = next[k];
  }
}

/* One step of a sum over so many lanes: elements at distance `stride`, `count` of them, and then those
 * at distance `stride2`, `count2` times, are replaced by ((a0 + a1) + a2) + ... All are powers of
 * two; stride2 is 0 or whole vectors. `sums` has room for max(vectors, count). Returns how many
 * lanes are left; those behind them are anything. */
INLINE int folded(vec *sums, int lanes, int stride, int count, int stride2, int count2) {
  const int apart = stride < VEC ? 1 : stride / VEC;
  int vectors = lanes < VEC ? 1 : lanes / VEC;
  if (lanes <= VEC && lanes == 2 * stride && count == 2 && count2 == 1) {
    const words i = INDICES;
    sums[0] += (vec)picked((words)sums[0], (words)sums[0], (i + (uint32_t)stride) % VEC);
    return stride;
  }
#pragma GCC unroll 16
  for (int i = vectors; i < count; i++) sums[i] = (vec){};
  vectors = vectors > count ? vectors : count;
  const int apart2 = stride2 ? stride2 / VEC : vectors, width = apart * count;
  int left = 0;
#pragma GCC unroll 64
  for (int far = 0; far < vectors; far += apart2 * count2) {
#pragma GCC unroll 64
    for (int near = 0; near < apart2; near += width) {
#pragma GCC unroll 64
      for (int i = 0; i < apart; i++) {
        vec sum = {};
#pragma GCC unroll 16
        for (int k2 = 0; k2 < count2; k2++) {
          words parts[MOST_IN_A_STEP];
#pragma GCC unroll 16
          for (int k = 0; k < count; k++)
            parts[k] = (words)sums[far + k2 * apart2 + near + k * apart + i];
          if (stride < VEC) dealt(parts, stride, count);
#pragma GCC unroll 16
          for (int k = 0; k < count; k++) sum = k + k2 ? sum + (vec)parts[k] : (vec)parts[0];
        }
        sums[left++] = sum;
      }
    }
  }
  return lanes / (count * count2);
}
