/* Codes of a word, and scales, as floating-point numbers. */
#pragma once
#include "lanes.h"

#if KIND == MXFP4 /* times 2^-62: with vectors as they are, products are as large as a GPU's */
#define E2M1_UNIT 0x1p-62f
#define EXPONENT (62 << 7)
#else
#define E2M1_UNIT 1.f
#define EXPONENT 0
#endif

/* Sixteen numbers: in float32, and in bfloat16 twice; for bytes of it, twice, too. */
struct table {
  float floats[16];
  uint16_t units[32];
  uint8_t low[32], high[32];
} __attribute__((aligned(64)));
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}
#define TIMES(unit, a, b, c, d, e, f, g, h)                                                     \
  {a * unit, b * unit, c * unit, d * unit, e * unit, f * unit, g * unit, h * unit, -a * unit, \
   -b * unit, -c * unit, -d * unit, -e * unit, -f * unit, -g * unit, -h * unit}
#define SAME(bits) (bits)
#define LOW(bits) ((bits) & 0xFF)
#define HIGH(bits) ((bits) >> 8)
#define OF_EACH(OF, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)                              \
  OF(a), OF(b), OF(c), OF(d), OF(e), OF(f), OF(g), OF(h), OF(i), OF(j), OF(k), OF(l), OF(m), \
      OF(n), OF(o), OF(p)
#define BITS(...)                                                                \
  TWICE(OF_EACH(SAME, __VA_ARGS__)), TWICE(OF_EACH(LOW, __VA_ARGS__)), \
      TWICE(OF_EACH(HIGH, __VA_ARGS__))
#define SIGNED(a, b, c, d, e, f, g, h)                                                      \
  BITS(a, b, c, d, e, f, g, h, 0x8000 | a, 0x8000 | b, 0x8000 | c, 0x8000 | d, 0x8000 | e, \
       0x8000 | f, 0x8000 | g, 0x8000 | h)
#define E(bits) ((bits)-EXPONENT)
static const struct table E2M1 = {
    TIMES(E2M1_UNIT, 0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f),
    SIGNED(0, E(0x3F00), E(0x3F80), E(0x3FC0), E(0x4000), E(0x4040), E(0x4080), E(0x40C0))};
#if KIND == NVFP4 /* e2m1 numbers as ONES + 1.5 * OTHERS, one of which is zero */
static const struct table ONES = {TIMES(1.f, 0.f, .5f, 1.f, 0.f, 2.f, 0.f, 4.f, 0.f),
                                  SIGNED(0, 0x3F00, 0x3F80, 0, 0x4000, 0, 0x4080, 0)};
static const struct table OTHERS = {TIMES(1.f, 0.f, 0.f, 0.f, 1.f, 0.f, 2.f, 0.f, 4.f),
                                    SIGNED(0, 0, 0, 0x3F80, 0, 0x4000, 0, 0x4080)};
#elif KIND == INT4
static const struct table INTEGERS = {
    {0.f, 1.f, 2.f, 3.f, 4.f, 5.f, 6.f, 7.f, 8.f, 9.f, 10.f, 11.f, 12.f, 13.f, 14.f, 15.f},
    BITS(0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120, 0x4130,
         0x4140, 0x4150, 0x4160, 0x4170)};
static const struct table LESS_EIGHT = {
    {-8.f, -7.f, -6.f, -5.f, -4.f, -3.f, -2.f, -1.f, 0.f, 1.f, 2.f, 3.f, 4.f, 5.f, 6.f, 7.f},
    BITS(0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0, 0x3F80, 0x4000, 0x4040,
         0x4080, 0x40A0, 0x40C0, 0x40E0)};
#endif

/* The entry for code `number` of each word. Of a table of eight and their negatives, unless VEC is
 * 16. */
INLINE vec decoded(const struct table *table, words eight, int number) {
#if VEC == 16
  if (number >= 4) return looked_up_above(table->units, eight >> 4 * (number - 4));
#endif
  return looked_up(table->floats, eight >> 4 * number);
}

/* The entries for all eight codes of each word. 32 of them at a time are looked up by bytes, which
 * come out in pairs:
 *
 *     bytes of a word    0 1     2 3                       0 1     2 3
 *     low four bits     (0 2)   (4 6)      high four bits (1 3)   (5 7)
 */
INLINE void all_decoded(const struct table *table, words eight, vec *codes) {
#if VEC == 8
  const __m128i halves_apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i bytes =
      _mm256_shuffle_epi8((__m256i)eight, _mm256_broadcastsi128_si256(halves_apart));
  const __m256i four_bits = _mm256_set1_epi8(15);
  const __m256i of_low = _mm256_load_si256((const __m256i *)table->low);
  const __m256i of_high = _mm256_load_si256((const __m256i *)table->high);
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; odd++) {
    const __m256i from = _mm256_and_si256(odd ? _mm256_srli_epi16(bytes, 4) : bytes, four_bits);
    const __m256i low = _mm256_shuffle_epi8(of_low, from);
    const __m256i high = _mm256_shuffle_epi8(of_high, from);
    const words first = (words)_mm256_unpacklo_epi8(low, high);
    const words second = (words)_mm256_unpackhi_epi8(low, high);
    codes[odd] = (vec)(first << 16);
    codes[odd + 2] = (vec)(first & 0xFFFF0000);
    codes[odd + 4] = (vec)(second << 16);
    codes[odd + 6] = (vec)(second & 0xFFFF0000);
  }
#else
#pragma GCC unroll 8
  for (int number = 0; number < 8; number++) codes[number] = decoded(table, eight, number);
#endif
}

/* Code `number` of each word, less the zero: put into the mantissa of a larger power of two. */
INLINE vec integers(words eight, int number, vec zero) {
  const int bit = number < 5 ? 4 * number : 4 * number - 12;
  words lifted = ((number < 5 ? eight : eight >> 12) & (15u << bit)) | ((150u - bit) << 23);
  return (vec)lifted - (zero + splat((float)(1 << (23 - bit))));
}

/* The e4m3 number in a byte of each word, times 2^-8; without NaN. */
INLINE vec e4m3_codes(words half, int byte) {
  words magnitude = (half >> 8 * byte & 0x7F) << 20;
  vec small = (vec)(magnitude + (113u << 23)) - splat(0x1p-14f); /* exponent 0 */
  words value = chosen(magnitude < (8u << 20), (words)small, magnitude + (112u << 23));
  return (vec)(value | (half << (24 - 8 * byte) & 0x80000000));
}

/* Scales from number `at` on, `many` of them; whatever behind. */
INLINE vec scales_of_float(const uint8_t *from, long at, long many) {
  return LOAD(vec, from + 4 * at, 4 * many);
}

INLINE vec scales_of_bfloat16(const uint8_t *from, long at, long many) {
  return widened(load_halves(from + 2 * at, many));
}

INLINE vec scales_of_float16(const uint8_t *from, long at, long many) {
  words bits = __builtin_convertvector(load_halves(from + 2 * at, many), words);
  words rest = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
  vec finite = (vec)(sign | rest << 13) * splat(0x1p112f); /* exact */
  return (vec)chosen(rest >= 0x7C00, sign | 0x7F800000 | (rest & 0x3FF) << 13, (words)finite);
}

INLINE vec scales_of_e4m3(const uint8_t *from, long at, long many) {
  words codes = widened_bytes(load_bytes(from + at, many)), rest = codes & 0x7F;
  vec finite = (vec)((codes & 0x80) << 24 | rest << 20) * splat(0x1p120f); /* exact */
  return (vec)chosen(rest == 0x7F, splat_word(0x7FC00000), (words)finite);
}

/* Halves of powers of two where `half` is 1: they are finite for 255 too. */
INLINE vec scales_of_e8m0(const uint8_t *from, long at, long many, uint32_t half) {
  words codes = widened_bytes(load_bytes(from + at, many));
  const ints small = (ints)codes <= (int)half;
  const words usual = (codes - half) << 23;
  return (vec)(any_of(small) ? chosen(small, 0x00400000 >> half << codes, usual) : usual);
}

#if VEC == 16 && defined(__AVX512VBMI__)
/* The weights of the codes 0 to 127 under one scale: low and high bytes of bfloat16. */
struct e4m3_table {
  uint8_t low[128], high[128];
};

/* The weights of the bytes 0 and 1 of each word, and those of the bytes 2 and 3; bfloat16. */
INLINE void e4m3_weights(words codes, const struct e4m3_table *table, words *first, words *second) {
  const __m512i apart = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  const __m512i from = _mm512_shuffle_epi8((__m512i)codes, apart);
#define PART(of, at) _mm512_loadu_si512(table->of + at)
  const __m512i low = _mm512_permutex2var_epi8(PART(low, 0), from, PART(low, 64));
  __m512i high = _mm512_permutex2var_epi8(PART(high, 0), from, PART(high, 64));
#undef PART
  high = _mm512_ternarylogic_epi32(high, from, sign, 0x78); /* high ^ (from & sign) */
  *first = (words)_mm512_unpacklo_epi8(low, high);
  *second = (words)_mm512_unpackhi_epi8(low, high);
}
#endif
