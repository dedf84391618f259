/* Spans of an expert's rows: gate and up with the activation, and down.
 *
 * The constants of a shape are in the file that the compiler is given as SHAPE. */
#pragma once
#define PLAIN 0
#define PACKED 1
#define MXFP4 2
#define FP8 3
#define INT4 4
#define NVFP4 5
#define F32 0
#define BF16 1
#define F16 2
#define E8M0 3
#define E4M3 4
#define PATCH_LANES 128
#include SHAPE

#include "activation.h"
#include "codes.h"
#include "dots.h"
#include "lanes.h"

#if VEC == 16
#define MOST_TOGETHER 8
#else
#define MOST_TOGETHER 4
#endif
#define MOST_BY_TURNS 4 /* vectors */
#define AT_ONCE 16 /* rows whose activations are computed together */

/* Where the parts of a matrix of one expert are. Packed weights: low bytes, codes, patches. */
struct matrix {
  const uint8_t *codes, *scales, *extra;
  const uint16_t *bias;
};

/* A vector as one thread reads it, and which it is: of that service, order and product. Services
 * are numbered from 1. */
struct prepared {
  float values[LONGEST] __attribute__((aligned(64)));
  uint64_t service, order, product;
#if IN_PAIRS
  int in_pairs; /* not in float32 */
#endif
};

#define NAME(x) up_##x
#define OF(x) UP_##x
#include "matrix.h"
#undef NAME
#undef OF
#define NAME(x) down_##x
#define OF(x) DOWN_##x
#include "matrix.h"
#undef NAME
#undef OF

#if KIND == PACKED
#define BASE(m, FIRST) ((const int32_t *)(m).extra)[(FIRST) / CHUNK * PATCHES]
#define FACTOR(m, FIRST) float_of((uint32_t)(BASE(m, FIRST) + 63) << 23)
#else
#define FACTOR(m, FIRST) 1.f
#endif

static void prepare_up(struct matrix m, const uint16_t *x, struct prepared *to) {
  up_prepare(x, FACTOR(m, UP_FIRST), to);
}

static void prepare_down(struct matrix m, const uint16_t *h, struct prepared *to) {
  down_prepare(h, FACTOR(m, DOWN_FIRST), to);
}

/* One row of gate_up; first_row: the first of those that a GPU's program does together. */
INLINE float up_row(struct matrix m, const uint16_t *x, const struct prepared *p,
                    struct up_scales *scales, long row, long first_row) {
  float sum = up_row_sum(m, p, scales, row);
#if KIND == PACKED
  sum = __builtin_fmaf(sum, 0x1p64f, up_patched(m, x, row, first_row));
#endif
  (void)x, (void)first_row;
  return HAS_BIAS ? sum + of_bfloat16(m.bias[row]) : sum;
}

/* Columns first to last - 1 of h. */
static void gate_up_span(struct matrix m, const uint16_t *x, const struct prepared *p, uint16_t *h,
                         long first, long last) {
  struct up_scales of_gates, of_ups;
  up_no_scales(&of_gates);
  up_no_scales(&of_ups);
  for (; first < last; first += AT_ONCE) {
    const long many = last - first < AT_ONCE ? last - first : AT_ONCE;
    float gates[AT_ONCE] = {0}, ups[AT_ONCE] = {0};
    for (long i = 0; i < many; i++) {
      const long row = first + i, tile = row / UP_SPAN * UP_SPAN;
      gates[i] = up_row(m, x, p, &of_gates, ALTERNATING ? 2 * row : row,
                        ALTERNATING ? 2 * tile : tile);
      ups[i] = up_row(m, x, p, &of_ups, ALTERNATING ? 2 * row + 1 : WIDTH + row,
                      ALTERNATING ? 2 * tile : WIDTH + tile);
    }
    for (long i = 0; i < AT_ONCE; i++) gates[i] = activated(gates[i], ups[i]);
    for (long i = 0; i < many; i++) h[first + i] = to_bfloat16(gates[i]);
  }
}

/* Rows first to last - 1 of y. */
static void down_span(struct matrix m, const uint16_t *h, const struct prepared *p, float *y,
                      long first, long last) {
  struct down_scales scales;
  down_no_scales(&scales);
  for (long row = first; row < last; row++) {
    float sum = down_row_sum(m, p, &scales, row);
#if KIND == PACKED
    sum = __builtin_fmaf(sum, 0x1p64f, down_patched(m, h, row, row / DOWN_SPAN * DOWN_SPAN));
#endif
    (void)h;
    y[row] = HAS_BIAS ? sum + of_bfloat16(m.bias[row]) : sum;
  }
}
