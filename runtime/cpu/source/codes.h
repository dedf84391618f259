/* Codes of a word as floating-point numbers. */
#pragma once
#include "lanes.h"

#if KIND == MXFP4 /* times 2^-62: with vectors as they are, products are as large as a GPU's */
#define E2M1_UNIT 0x1p-62f
#else
#define E2M1_UNIT 1.f
#endif
static const float E2M1[16] = {
    0.f, .5f * E2M1_UNIT, 1.f * E2M1_UNIT, 1.5f * E2M1_UNIT,
    2.f * E2M1_UNIT, 3.f * E2M1_UNIT, 4.f * E2M1_UNIT, 6.f * E2M1_UNIT,
    -0.f, -.5f * E2M1_UNIT, -1.f * E2M1_UNIT, -1.5f * E2M1_UNIT,
    -2.f * E2M1_UNIT, -3.f * E2M1_UNIT, -4.f * E2M1_UNIT, -6.f * E2M1_UNIT,
};

/* Code `number` of each word, less the zero: put into the mantissa of a larger power of two. */
INLINE vec integers(words eight, int number, vec zero) {
  const int bit = number < 5 ? 4 * number : 4 * number - 12;
  words lifted = ((number < 5 ? eight : eight >> 12) & (15u << bit)) | ((150u - bit) << 23);
  return (vec)lifted - (zero + splat((float)(1 << (23 - bit))));
}

/* The e4m3 number in a byte of each half word, times 2^-8; without NaN. */
INLINE vec e4m3_codes(words half, int byte) {
  words magnitude = (half >> 8 * byte & 0x7F) << 20;
  vec small = (vec)(magnitude + (113u << 23)) - splat(0x1p-14f); /* exponent 0 */
  ints is_small = magnitude < (8u << 20);
  words value = ((words)is_small & (words)small) | (~(words)is_small & (magnitude + (112u << 23)));
  return (vec)(value | (half << (24 - 8 * byte) & 0x80000000));
}
