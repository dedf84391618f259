/* Words of eight codes, decoded: the part of matrix.h for matrices in codes. A lane has one word,
 * of 32 bits, or of 64 for codes of eight bits. */

#define WORDS_OF_SCALE (OF(GROUP) / 8)
#define ONE_SCALE (OF(GROUP) >= OF(COLUMNS))
#define GROUPS (ONE_SCALE ? 1 : (OF(COLUMNS) + OF(GROUP) - 1) / OF(GROUP))
#define PADDED (ONE_SCALE ? 1 : TILES * LANES / WORDS_OF_SCALE + 2 * VEC)
#define SCALES (2 * PADDED)
#define ABSENT (KIND == INT4 && !OF(ZEROS) && !ONE_SCALE ? -0.f : 0.f) /* code 0 x scale 0 */

/* The scales of a row, and behind them its zeros, if it has any; zeros behind the end of both. */
static void NAME(read_scales)(struct matrix m, long row, float *scales) {
  const long at = (KIND == NVFP4 ? row : row / OF(ROWS)) * GROUPS;
  for (int i = 0; i < GROUPS; i++) {
#if OF(SCALE) == F32
    scales[i] = ((const float *)m.scales)[at + i];
#elif OF(SCALE) == BF16
    scales[i] = of_bfloat16(((const uint16_t *)m.scales)[at + i]);
#elif OF(SCALE) == F16
    scales[i] = of_float16(((const uint16_t *)m.scales)[at + i]);
#elif OF(SCALE) == E8M0 && KIND == MXFP4
    scales[i] = half_of_e8m0(m.scales[at + i]);
#elif OF(SCALE) == E8M0
    scales[i] = of_e8m0(m.scales[at + i]);
#else
    scales[i] = of_e4m3(m.scales[at + i]);
#endif
  }
#if KIND == NVFP4
  const float whole = ((const float *)m.extra)[row / OF(ROWS)];
  for (int i = 0; i < GROUPS; i++) scales[i] = OF(DIVIDES) ? scales[i] / whole : scales[i] * whole;
#endif
  for (int i = 0; i < GROUPS; i++) {
    if (KIND == FP8) scales[i] *= 256.f;
    scales[i] = scales[i] != scales[i] ? float_of(0x7FC00000) : scales[i]; /* see `rounded` */
  }
  for (int i = GROUPS; i < PADDED; i++) scales[i] = 0.f;
#if OF(ZEROS)
  for (int i = 0; i < PADDED; i++) scales[PADDED + i] = i < GROUPS ? m.extra[at + i] : 0.f;
#endif
}

/* The scale of each of VEC words, from word number `word` of the row on. */
INLINE vec NAME(spread)(const float *scales, int word) {
  if (ONE_SCALE) return splat(scales[0]);
  if (WORDS_OF_SCALE % VEC == 0) return splat(scales[word / WORDS_OF_SCALE]);
  if (VEC % WORDS_OF_SCALE == 0)
    return repeated(load_floats(scales + word / WORDS_OF_SCALE), WORDS_OF_SCALE, 0);
  vec spread;
  for (int i = 0; i < VEC; i++) spread[i] = scales[(word + i) / WORDS_OF_SCALE];
  return spread;
}

/* A product of codes and scales as a weight. */
INLINE vec NAME(weight)(vec codes, vec scale) {
  vec product = codes * scale;
#if OF(PRODUCT) == F16
  product = rounded_to_float16(product);
#endif
  return rounded(product);
}

INLINE vec NAME(coded)(vec sums, const uint8_t *codes, const float *scales, long at, int word,
                       const float *x, int many) {
  const vec scale = NAME(spread)(scales, word);
#if KIND == FP8
  const uint8_t *from = codes + 8 * at;
  words first = LOAD(words, from, 8 * many);
  words second = LOAD(words, from + sizeof(words), 8 * many - (long)sizeof(words));
  words low = every_other(first, second, 1, 0), high = every_other(first, second, 1, 1);
  words full = ((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101);
  ints is_nan = (ints)(full & 0x80808080) != 0;
  vec safe = (vec)(((words)scale & ~(words)is_nan) | ((words)is_nan & 0x7FC00000));
#define ADD(half, byte, element) \
  sums = fused(NAME(weight)(e4m3_codes(half, byte), safe), X(element), sums);
  ADD(low, 0, 0) ADD(low, 2, 2) ADD(low, 1, 1) ADD(low, 3, 3)
  ADD(high, 0, 4) ADD(high, 2, 6) ADD(high, 1, 5) ADD(high, 3, 7)
#undef ADD
#else
  const words eight = LOAD(words, codes + 4 * at, 4 * many);
#if KIND == MXFP4
  vec products = {};
#define ADD(element) products = fused(looked_up(E2M1, eight >> 4 * element), X(element), products);
#elif KIND == NVFP4
#define ADD(element) \
  sums = fused(NAME(weight)(looked_up(E2M1, eight >> 4 * element), scale), X(element), sums);
#elif VEC == 16 && (ONE_SCALE || WORDS_OF_SCALE % VEC == 0) /* a scale has but 16 weights */
  const vec zero = OF(ZEROS) ? NAME(spread)(scales + PADDED, word) : splat(8.f);
  const words sixteen = INDICES;
  const vec weights = NAME(weight)(__builtin_convertvector((ints)sixteen, vec) - zero, scale);
#define ADD(element) sums = fused(taken(weights, eight >> 4 * element), X(element), sums);
#else
  const vec zero = OF(ZEROS) ? NAME(spread)(scales + PADDED, word) : splat(8.f);
#define ADD(element) \
  sums = fused(NAME(weight)(integers(eight, element, zero), scale), X(element), sums);
#endif
  ADD(0) ADD(4) ADD(1) ADD(5) ADD(2) ADD(6) ADD(3) ADD(7)
#undef ADD
#if KIND == MXFP4 /* scales are powers of two: the eight products wait for theirs */
  sums = fused(products * 0x1p63f, scale, sums);
#endif
#endif
  return sums;
}


