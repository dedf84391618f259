/* Four-bit numbers times the vector, two columns in one instruction (AVX512_BF16).
 *
 * It adds the product of the high halves of two words of bfloat16 to a sum, rounds, adds that of the
 * low halves, and rounds: the order of sums of matrix.h, if the first of two columns is in the high
 * half. But it takes subnormal numbers for zero, so nothing may become one: the vector's elements
 * must be zero or of a usual size. Then the products are those of larger vectors and smaller codes,
 * but for a power of two, since none of these loses a bit to underflow either.
 *
 *     bits of a word  31  28  24  20  16  12   8   4   0
 *     column            7   6   5   4   3   2   1   0
 *     turned by 16+4k   ...         k         ...  k+4      in the low bits of each half
 */
#pragma once
#include "codes.h"

#if VEC == 16 && KIND == MXFP4 && defined(__AVX512BF16__)
#define IN_PAIRS 1
#else
#define IN_PAIRS 0
#endif

#if IN_PAIRS
/* Of usual size: from 2^-70 (2^-79 would do) to 2^64, which a GPU's 2^64 times as much excludes. */
#define LEAST_USUAL ((127 - 70) << 7)
#define MOST_USUAL ((127 + 64) << 7)

/* Twice the numbers of the codes, since scales are halves. */
static const struct table TWICE_E2M1 = {
    TIMES(2.f, 0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f),
    SIGNED(0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140)};

INLINE int is_usual(uint16_t x) {
  const int size = x & 0x7FFF;
  return size == 0 || (size >= LEAST_USUAL && size < MOST_USUAL);
}

/* sums plus the products of the high halves, then plus those of the low halves. */
INLINE vec plus_pairs(vec sums, words a, words b) {
  return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

/* The numbers of the columns k (high halves) and k + 4 of each word. */
INLINE words pair_of_codes(words eight, const int k) {
  const __m512i turned = _mm512_ror_epi32((__m512i)eight, 16 + 4 * k);
  return (words)_mm512_permutexvar_epi16(turned, _mm512_load_si512(TWICE_E2M1.units));
}

/* Whether this processor adds pairs in that order, with these roundings: tried with numbers of which
 * most sums are rounded. */
static int pairs_in_order(void) {
  uint32_t state = 1;
  int same = 1;
  for (int turn = 0; turn < 64; turn++) {
    words a, b;
    vec sums = {};
    vec expected = {};
    for (int step = 0; step < 4; step++) {
      for (int lane = 0; lane < VEC; lane++) {
        uint32_t drawn[2];
        for (int i = 0; i < 2; i++) { /* two of usual size in bfloat16, some of them negative */
          state = state * 1664525 + 1013904223;
          const uint32_t bits = state >> 4;
          drawn[i] = (bits & 0x807F807F) + ((121 + (bits >> 8 & 7)) << 7) +
                     ((121 + (bits >> 24 & 3)) << 23);
        }
        a[lane] = drawn[0], b[lane] = drawn[1];
      }
      sums = plus_pairs(sums, a, b);
      expected = fused((vec)(a & 0xFFFF0000), (vec)(b & 0xFFFF0000), expected);
      expected = fused((vec)(a << 16), (vec)(b << 16), expected);
    }
    same &= !any_of((ints)((words)sums ^ (words)expected));
  }
  return same;
}

static int pairs_are_sums; /* by `pairs_in_order`, once for the process */

/* Whether sums of pairs with this vector have the written-down order's bits. */
static int pairs_are_exact(const uint16_t *x, int columns) {
  int usual = pairs_are_sums;
  for (int i = 0; i < columns; i++) usual &= is_usual(x[i]);
  return usual;
}
#endif
