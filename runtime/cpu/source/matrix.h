/* Products of rows of one matrix with a vector; included once for each matrix of an expert.
 *
 * NAME(x): the name x for this matrix; OF(X): its constant X. A row is cut into tiles of BLOCK_K
 * columns. Lane j of a tile has the columns j (plain), or the eight from 8 j on; its products are
 * added to lane j of the sum, tile by tile. The vector lies ready in the order of use: of each tile
 * element 0 of all lanes, then element 1, ...; zeros behind its end.
 */

#if KIND == PLAIN
#define EACH 1
#else
#define EACH 8
#endif
#define LANES (OF(BLOCK_K) / EACH)
#define VECTORS (LANES / VEC)
#define TILES ((OF(COLUMNS) + OF(BLOCK_K) - 1) / OF(BLOCK_K))
#define LAST_LANES ((OF(COLUMNS) - (TILES - 1) * OF(BLOCK_K)) / EACH)
#define TOGETHER (VECTORS < MOST_TOGETHER ? VECTORS : MOST_TOGETHER)
#define BY_TURNS (TOGETHER < MOST_BY_TURNS ? TOGETHER : MOST_BY_TURNS)

#if IN_PAIRS
/* The same in bfloat16: instead of elements 0 to 3, these (high) and elements 4 to 7. */
static void NAME(prepare_pairs)(const uint16_t *x, float *prepared) {
  for (int tile = 0; tile < TILES; tile++) {
    const int lanes = tile < TILES - 1 ? LANES : LAST_LANES;
    const uint16_t *from = x + tile * OF(BLOCK_K);
    uint32_t pairs[4 * LANES] = {0};
    for (int lane = 0; lane < lanes; lane++)
      for (int k = 0; k < 4; k++)
        pairs[k * LANES + lane] =
            (uint32_t)from[lane * EACH + k] << 16 | from[lane * EACH + k + 4];
    memcpy(prepared + tile * OF(BLOCK_K), pairs, sizeof pairs);
  }
}
#endif

static void NAME(prepare)(const uint16_t *x, float factor, struct prepared *to) {
#if IN_PAIRS
  to->in_pairs = pairs_are_exact(x, OF(COLUMNS));
  if (to->in_pairs) {
    NAME(prepare_pairs)(x, to->values);
    return;
  }
#endif
  for (int tile = 0; tile < TILES; tile++) {
    int lanes = tile < TILES - 1 ? LANES : LAST_LANES;
    const uint16_t *from = x + tile * OF(BLOCK_K);
    float *values = to->values + tile * OF(BLOCK_K);
    for (int element = 0; element < EACH; element++)
      for (int lane = 0; lane < LANES; lane++)
        values[element * LANES + lane] =
            lane < lanes ? of_bfloat16(from[lane * EACH + element]) * factor : 0.f;
#if KIND == MXFP4 /* infinite where the GPU's 2^64 times as much is */
    for (int i = 0; i < OF(BLOCK_K); i++) values[i] = values[i] * 0x1p64f * 0x1p-64f;
#endif
  }
}

#define X(i, element) load_floats(x + (element) * LANES + (i) * VEC)
#if KIND >= MXFP4
#include "coded.h"
#else
#define ABSENT 0.f
#define SIMPLE 0
struct NAME(scales) {
  int simple;
};
INLINE void NAME(no_scales)(struct NAME(scales) *scales) { scales->simple = 0; }
#endif

#if KIND < MXFP4
/* Sums plus the products of `many` lanes (all in VEC) from lane `at` of the matrix on. */
INLINE vec NAME(added)(vec sums, struct matrix m, long at, const float *x, int many) {
#if KIND == PLAIN
  return fused(widened(LOAD(halves, m.codes + 2 * at, 2 * many)), X(0, 0), sums);
#elif KIND == PACKED
  const uint8_t *from = m.codes + 8 * at;
  words first = LOAD(words, from, 8 * many);
  words second = LOAD(words, from + sizeof(words), 8 * many - (long)sizeof(words));
  words codes = LOAD(words, m.scales + 4 * at, 4 * many);
  words low = every_other(first, second, 1, 0), high = every_other(first, second, 1, 1), both;
#define EVEN(w) (((w & 0x00800080) << 8) | (w & 0x007F007F))
#define ODD(w) ((w & 0x80008000) | ((w >> 8) & 0x007F007F))
#define ADD(one, other)                             \
  sums = fused((vec)(both << 16), X(0, one), sums); \
  sums = fused((vec)(both & 0xFFFF0000), X(0, other), sums);
  both = (codes << 7 & 0x07800780) | EVEN(low);
  ADD(0, 2)
  both = (codes << 3 & 0x07800780) | ODD(low);
  ADD(1, 3)
  both = (codes >> 1 & 0x07800780) | EVEN(high);
  ADD(4, 6)
  both = (codes >> 5 & 0x07800780) | ODD(high);
  ADD(5, 7)
#undef EVEN
#undef ODD
#undef ADD
  return sums;
#endif
}
#endif

/* Add to `count` vectors of sums the products of as many lanes of row `row`, `many` in each (all in
 * VEC), from lane `lane` of a tile on, with x, which is ready from that lane on. */
INLINE void NAME(add)(vec *sums, struct matrix m, const struct NAME(scales) *scales, int simple,
                      long row, int tile, int lane, const float *x, int many, const int count) {
  const long at = row * (OF(COLUMNS) / EACH) + (long)tile * LANES + lane;
#if KIND >= MXFP4
  NAME(coded)(sums, m.codes, scales, simple, at, tile * LANES + lane, x, many, count);
#else
  (void)scales, (void)simple;
#pragma GCC unroll 8
  for (int i = 0; i < count; i++)
    sums[i] = NAME(added)(sums[i], m, at + i * VEC, x + i * VEC, many);
#endif
}

/* The sum of products of a row whose scales are read. */
INLINE float NAME(sum_of)(struct matrix m, const float *x, const struct NAME(scales) *scales,
                          int simple, long row) {
  vec sums[VECTORS < 16 ? 16 : VECTORS];
  for (int first = 0; first < VECTORS; first += TOGETHER) {
    vec some[TOGETHER] = {};
    for (int tile = 0; tile < TILES - (LAST_LANES < LANES); tile++) {
      const float *x_of_tile = x + tile * OF(BLOCK_K);
#pragma GCC unroll 16
      for (int i = 0; i < TOGETHER; i += BY_TURNS) {
        int lane = (first + i) * VEC;
        NAME(add)(some + i, m, scales, simple, row, tile, lane, x_of_tile + lane, VEC, BY_TURNS);
      }
    }
    if (LAST_LANES < LANES) { /* lanes without a column add 0 * 0 */
      const int tile = TILES - 1;
#pragma GCC unroll 16
      for (int i = 0; i < TOGETHER; i++) {
        int lane = (first + i) * VEC, many = LAST_LANES - lane;
        const float *x_of_lane = x + tile * OF(BLOCK_K) + lane;
        if (many >= VEC)
          NAME(add)(some + i, m, scales, simple, row, tile, lane, x_of_lane, VEC, 1);
        else if (many > 0)
          NAME(add)(some + i, m, scales, simple, row, tile, lane, x_of_lane, many, 1);
        else
          some[i] += splat(ABSENT);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER; i++) sums[first + i] = some[i];
  }
  int left = LANES;
#define STEP(...) left = folded(sums, left, __VA_ARGS__);
  OF(STEPS)
#undef STEP
  return sums[0][0];
}

#if SIMPLE
static __attribute__((noinline)) float NAME(unusual_sum)(
    struct matrix m, const float *x, const struct NAME(scales) *scales, long row) {
  return NAME(sum_of)(m, x, scales, 0, row);
}
#endif

/* The sum of products of a row; patches and biases are left out. */
INLINE float NAME(row_sum)(struct matrix m, const struct prepared *p, struct NAME(scales) *scales,
                           long row) {
#if KIND >= MXFP4
  NAME(read_scales)(m, row, scales);
#endif
#if SIMPLE
  if (!NAME(is_simple)(p, scales)) return NAME(unusual_sum)(m, p->values, scales, row);
#endif
  return NAME(sum_of)(m, p->values, scales, SIMPLE, row);
}

#if KIND == PACKED
static float NAME(patch_sum)(const float *lanes) {
  vec sums[PATCH_LANES / VEC < 16 ? 16 : PATCH_LANES / VEC];
  for (int i = 0; i < PATCH_LANES / VEC; i++) sums[i] = load_floats(lanes + i * VEC);
  int left = PATCH_LANES;
#define STEP(...) left = folded(sums, left, __VA_ARGS__);
  OF(PATCH_STEPS)
#undef STEP
  return sums[0][0];
}

/* The patches' share of a row: entries 128 at a time from the first that the row's program looks
 * at, each in its place among 128 lanes. Entries of a chunk end with a zero. */
static float NAME(patched)(struct matrix m, const uint16_t *x, long row, long first_row) {
  const int32_t *patches = (const int32_t *)m.extra;
  const long first = (OF(FIRST) + first_row * OF(COLUMNS)) / CHUNK * PATCHES;
  const long start = OF(FIRST) + row * OF(COLUMNS), end = start + OF(COLUMNS);
  float sum = 0.f, lanes[PATCH_LANES];
  long tile = -1;
  int many = 0;
  for (long chunk = start / CHUNK; chunk * CHUNK < end; chunk++) {
    for (int i = 1; i < PATCHES; i++) {
      long at = chunk * PATCHES + i, entry = at - first;
      int32_t patch = patches[at];
      if (patch == 0) break;
      long unit = chunk * CHUNK + (patch >> 16);
      if (unit < start || unit >= end) continue;
      if (entry / PATCH_LANES != tile) {
        if (many) sum += NAME(patch_sum)(lanes);
        memset(lanes, 0, sizeof lanes);
        tile = entry / PATCH_LANES, many = 0;
      }
      lanes[entry % PATCH_LANES] = of_bfloat16((uint16_t)patch) * of_bfloat16(x[unit - start]);
      many++;
    }
  }
  if (many) sum += NAME(patch_sum)(lanes);
  return sum;
}
#endif

#undef X
#undef ABSENT
#undef SIMPLE
#undef BY_SCALES
#undef SPLIT
#undef IN_PARTS
#undef TABLES
#undef ONE_SCALE_A_VECTOR
#undef WORDS_OF_SCALE
#undef ONE_SCALE
#undef GROUPS
#undef PADDED
#undef EACH
#undef LANES
#undef VECTORS
#undef TILES
#undef LAST_LANES
#undef TOGETHER
#undef BY_TURNS
