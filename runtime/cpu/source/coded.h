/* Words of eight codes, decoded: the part of matrix.h for matrices in codes. A lane has one word,
 * of 32 bits, or of 64 for codes of eight bits.
 *
 * A weight is code * scale, rounded to bfloat16. With the widest vectors there are ways to the same
 * bits in fewer operations:
 *
 *     SPLIT     a bfloat16 scale times an integer of four bits has 12 bits: p is rounded to 8 of them
 *               as (p + 2^16 p) - ((p + 2^16 p) - p), where each sum is rounded once
 *     IN_PARTS  e2m1 numbers are powers of two times 1 or 1.5, so that a scale has two roundings
 *     TABLES    128 columns of e4m3 numbers have one scale: their weights are looked up (e4m3.h)
 *     IN_PAIRS  e2m1 numbers whose scales wait are multiplied two at a time (dots.h)
 *
 * The first two are for rows whose scales are all usual: nothing overflows or loses bits below.
 * The last is for vectors of usual numbers.
 */

#define WORDS_OF_SCALE (OF(GROUP) / 8)
#define ONE_SCALE (OF(GROUP) >= OF(COLUMNS))
#define GROUPS (ONE_SCALE ? 1 : (OF(COLUMNS) + OF(GROUP) - 1) / OF(GROUP))
#define PADDED (ONE_SCALE ? VEC : TILES * LANES / WORDS_OF_SCALE + 2 * VEC)
#define ABSENT (KIND == INT4 && !OF(ZEROS) && !ONE_SCALE ? -0.f : 0.f) /* code 0 x scale 0 */
#define ONE_SCALE_A_VECTOR (ONE_SCALE || WORDS_OF_SCALE % VEC == 0)
#define MOST_ZERO 16 /* so that an integer less its zero has four bits, or is a power of two */

#if VEC == 16 && KIND == INT4 && OF(PRODUCT) == BF16 && OF(SCALE) == BF16
#define SPLIT (!ONE_SCALE_A_VECTOR)
#else
#define SPLIT 0
#endif
#define IN_PARTS (VEC == 16 && KIND == NVFP4)
#define BY_SCALES (SPLIT || IN_PARTS)
#define SIMPLE (BY_SCALES || IN_PAIRS)
#if VEC == 16 && defined(__AVX512VBMI__) && KIND == FP8 && ONE_SCALE_A_VECTOR
#define TABLES GROUPS
#else
#define TABLES 0
#endif

/* The scales of a row, in float32 and rounded where they are taken IN_PARTS, and behind them as many
 * other numbers of its groups: its zeros, or the roundings of 1.5 times the scales. */
struct NAME(scales) {
  long row; /* the first of those that have these scales */
  int simple;
  float values[2 * PADDED] __attribute__((aligned(64)));
#if TABLES
  struct e4m3_table tables[TABLES];
#endif
};

/* Scales from number `at` on, `many` of them. */
INLINE vec NAME(scales_at)(struct matrix m, long at, long many) {
#if OF(SCALE) == F32
  vec scales = scales_of_float(m.scales, at, many);
#elif OF(SCALE) == BF16
  vec scales = scales_of_bfloat16(m.scales, at, many);
#elif OF(SCALE) == F16
  vec scales = scales_of_float16(m.scales, at, many);
#elif OF(SCALE) == E8M0
  vec scales = scales_of_e8m0(m.scales, at, many, KIND == MXFP4);
#else
  vec scales = scales_of_e4m3(m.scales, at, many);
#endif
  return scales;
}

/* A product of codes and scales as a weight. */
INLINE vec NAME(weight)(vec codes, vec scale) {
  vec product = codes * scale;
#if OF(PRODUCT) == F16
  product = rounded_to_float16(product);
#endif
  return rounded(product);
}

#if TABLES
#include "e4m3.h"
#endif

/* Scales from number `at` on, `many` of them, and zeros behind. `row` is theirs. */
INLINE vec NAME(multiples_at)(struct matrix m, long row, long at, long many) {
  vec some = NAME(scales_at)(m, at, many);
#if KIND == NVFP4
  const vec whole = splat(((const float *)m.extra)[row / OF(ROWS)]);
  some = OF(DIVIDES) ? some / whole : some * whole;
#endif
  (void)row;
  if (KIND == FP8) some *= 256.f;
  if (many >= VEC) return some;
  const words number = INDICES;
  return (vec)chosen(number < (uint32_t)many, (words)some, (words){});
}

/* Elements that are no usual numbers: zero, or from 2^-100 to 2^100. */
INLINE ints NAME(unusual)(vec some) {
  const words bits = (words)some << 1;
  return (ints)(bits - (27u << 24) > (200u << 24)) & (ints)(bits != 0);
}

static void NAME(read_scales)(struct matrix m, long row, struct NAME(scales) *scales) {
  const long first = KIND == NVFP4 ? row : row / OF(ROWS) * OF(ROWS);
  if (scales->row == first) return;
  scales->row = first;
  const long at = first / (KIND == NVFP4 ? 1 : OF(ROWS)) * GROUPS;
  float *values = scales->values;
  ints unusual = {};
  for (int i = 0; i < GROUPS; i += VEC) {
    vec some = NAME(multiples_at)(m, row, at + i, GROUPS - i);
    if (BY_SCALES) unusual |= NAME(unusual)(some);
    else if (OF(SCALE) != E8M0) some = without_payload(some); /* those are never NaN */
#if IN_PARTS
    const vec more = rounded(some * 1.5f);
    memcpy(values + PADDED + i, &more, sizeof more);
    some = rounded(some);
#elif OF(ZEROS)
    const vec zeros = __builtin_convertvector(
        (ints)widened_bytes(load_bytes(m.extra + at + i, GROUPS - i)), vec);
    if (BY_SCALES) unusual |= zeros > splat(MOST_ZERO);
    memcpy(values + PADDED + i, &zeros, sizeof zeros);
#endif
    memcpy(values + i, &some, sizeof some);
  }
  scales->simple = BY_SCALES && !any_of(unusual);
  for (int i = 0; BY_SCALES && !scales->simple && i < GROUPS; i += VEC) {
    const vec some = without_payload(NAME(multiples_at)(m, row, at + i, GROUPS - i));
    memcpy(values + i, &some, sizeof some);
  }
#if TABLES
  for (int i = 0; i < TABLES; i++) NAME(fill_table)(scales->tables + i, splat(values[i]));
#endif
}

/* Whether a row is summed in the simple way. */
INLINE int NAME(is_simple)(const struct prepared *p, const struct NAME(scales) *scales) {
#if IN_PAIRS
  return p->in_pairs;
#else
  return scales->simple;
#endif
}

/* Zeros behind the end of the scales, and -1 for their row: before the first is read. */
static void NAME(no_scales)(struct NAME(scales) *scales) {
  memset(scales, 0, sizeof *scales);
  scales->row = -1;
}

/* The scale of each of VEC words, from word number `word` of the row on. */
INLINE vec NAME(spread)(const float *scales, int word) {
  if (ONE_SCALE) return splat(scales[0]);
  if (WORDS_OF_SCALE % VEC == 0) return splat(scales[word / WORDS_OF_SCALE]);
  if (VEC % WORDS_OF_SCALE == 0)
    return spread_out(scales + word / WORDS_OF_SCALE, WORDS_OF_SCALE);
  vec spread;
  for (int i = 0; i < VEC; i++) spread[i] = scales[(word + i) / WORDS_OF_SCALE];
  return spread;
}

#if KIND == FP8
INLINE vec NAME(coded_bytes)(vec sums, const uint8_t *codes, const struct NAME(scales) *scales,
                             long at, int word, const float *x, int many) {
  const uint8_t *from = codes + 8 * at;
  words first = LOAD(words, from, 8 * many);
  words second = LOAD(words, from + sizeof(words), 8 * many - (long)sizeof(words));
  words low = every_other(first, second, 1, 0), high = every_other(first, second, 1, 1);
#if TABLES
  const int group = ONE_SCALE ? 0 : word / WORDS_OF_SCALE;
  return NAME(looked_up)(sums, low, high, scales->tables + group, x);
#else
  const vec scale = NAME(spread)(scales->values, word);
  words full = ((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101);
  ints is_nan = (ints)(full & 0x80808080) != 0;
  vec safe = (vec)chosen(is_nan, splat_word(0x7FC00000), (words)scale);
#define ADD(half, byte, element) \
  sums = fused(NAME(weight)(e4m3_codes(half, byte), safe), X(0, element), sums);
  ADD(low, 0, 0) ADD(low, 2, 2) ADD(low, 1, 1) ADD(low, 3, 3)
  ADD(high, 0, 4) ADD(high, 2, 6) ADD(high, 1, 5) ADD(high, 3, 7)
#undef ADD
  return sums;
#endif
}

INLINE void NAME(coded)(vec *sums, const uint8_t *codes, const struct NAME(scales) *scales,
                        int simple, long at, int word, const float *x, int many, const int count) {
#pragma GCC unroll 8
  for (int i = 0; i < count; i++)
    sums[i] = NAME(coded_bytes)(sums[i], codes, scales, at + i * VEC, word + i * VEC, x + i * VEC,
                                many);
  (void)simple;
}
#else

#if KIND == INT4
/* A weight: one of sixteen where the scale is the same in all lanes. */
INLINE vec NAME(weight_of)(words eight, int element, vec scale, vec zero, int simple) {
#if ONE_SCALE_A_VECTOR && VEC == 16
  const words sixteen = INDICES;
  const vec weights = NAME(weight)(__builtin_convertvector((ints)sixteen, vec) - zero, scale);
  return taken(weights, eight >> 4 * element);
#else
  if (!simple) return NAME(weight)(integers(eight, element, zero), scale);
  const vec code = OF(ZEROS) ? decoded(&INTEGERS, eight, element) - zero
                             : decoded(&LESS_EIGHT, eight, element);
  const vec large = code * (scale * splat(65537.f));
  return large - fused(code, -scale, large);
#endif
}
#elif KIND == NVFP4
INLINE vec NAME(weight_of)(words eight, int element, vec scale, vec more, int simple) {
  if (!simple) return NAME(weight)(decoded(&E2M1, eight, element), scale);
  return fused(decoded(&ONES, eight, element), scale, decoded(&OTHERS, eight, element) * more);
}
#endif

/* Of so many vectors side by side: by turns, so that none waits for its last sum. */
INLINE void NAME(coded)(vec *sums, const uint8_t *codes, const struct NAME(scales) *scales,
                        int simple, long at, int word, const float *x, int many, const int count) {
  words eight[MOST_BY_TURNS];
  vec scale[MOST_BY_TURNS], other[MOST_BY_TURNS], products[MOST_BY_TURNS];
#define EACH_VECTOR _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
  EACH_VECTOR {
    eight[i] = LOAD(words, codes + 4 * (at + i * VEC), 4 * many);
    scale[i] = NAME(spread)(scales->values, word + i * VEC);
#if KIND == NVFP4 || OF(ZEROS)
    other[i] = NAME(spread)(scales->values + PADDED, word + i * VEC);
#else
    other[i] = splat(8.f);
#endif
    products[i] = (vec){};
  }
#if KIND == MXFP4 /* scales are powers of two: the eight products wait for theirs */
#if IN_PAIRS
  if (simple) {
#define ADD(k) \
  EACH_VECTOR products[i] = plus_pairs(products[i], pair_of_codes(eight[i], k), (words)X(i, k));
    ADD(0) ADD(1) ADD(2) ADD(3)
#undef ADD
    EACH_VECTOR sums[i] = fused(products[i], scale[i], sums[i]);
    return;
  }
#endif
  EACH_VECTOR {
    vec code[8];
    all_decoded(&E2M1, eight[i], code);
#define ADD(element) products[i] = fused(code[element], X(i, element), products[i]);
    ADD(0) ADD(4) ADD(1) ADD(5) ADD(2) ADD(6) ADD(3) ADD(7)
    sums[i] = fused(products[i] * 0x1p63f, scale[i], sums[i]);
  }
#elif KIND == NVFP4 && VEC == 8
  EACH_VECTOR {
    vec code[8];
    all_decoded(&E2M1, eight[i], code);
#define ADD(element) \
  sums[i] = fused(NAME(weight)(code[element], scale[i]), X(i, element), sums[i]);
    ADD(0) ADD(4) ADD(1) ADD(5) ADD(2) ADD(6) ADD(3) ADD(7)
  }
#else
#define ADD(element)                                                                         \
  EACH_VECTOR sums[i] =                                                                      \
      fused(NAME(weight_of)(eight[i], element, scale[i], other[i], simple), X(i, element), sums[i]);
  ADD(0) ADD(4) ADD(1) ADD(5) ADD(2) ADD(6) ADD(3) ADD(7)
#endif
#undef ADD
#undef EACH_VECTOR
  (void)simple, (void)other;
}
#endif
