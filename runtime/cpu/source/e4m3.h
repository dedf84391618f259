/* Weights of e4m3 codes under one scale, looked up: included once for each matrix. */

/* The table of a scale, filled by the same operations that would decode a code by itself. */
static void NAME(fill_table)(struct e4m3_table *table, vec scale) {
  for (int first = 0; first < 128; first += VEC) {
    const words from = INDICES, codes = from + (uint32_t)first;
    const vec safe = (vec)chosen(codes == 127, splat_word(0x7FC00000), (words)scale);
    const words weights = (words)NAME(weight)(e4m3_codes(codes, 0), safe);
    const bytes low = __builtin_convertvector(weights >> 16 & 0xFF, bytes);
    const bytes high = __builtin_convertvector(weights >> 24, bytes);
    memcpy(table->low + first, &low, sizeof low);
    memcpy(table->high + first, &high, sizeof high);
  }
}

/* Sums plus products of eight elements: 0 to 3 in the words of `low`, 4 to 7 in those of `high`. */
INLINE vec NAME(looked_up)(vec sums, words low, words high, const struct e4m3_table *table,
                           const float *x) {
  words a, b, c, d;
  e4m3_weights(low, table, &a, &b);
  e4m3_weights(high, table, &c, &d);
  sums = fused((vec)(a << 16), X(0, 0), sums);
  sums = fused((vec)(b << 16), X(0, 2), sums);
  sums = fused((vec)(a & 0xFFFF0000), X(0, 1), sums);
  sums = fused((vec)(b & 0xFFFF0000), X(0, 3), sums);
  sums = fused((vec)(c << 16), X(0, 4), sums);
  sums = fused((vec)(d << 16), X(0, 6), sums);
  sums = fused((vec)(c & 0xFFFF0000), X(0, 5), sums);
  return fused((vec)(d & 0xFFFF0000), X(0, 7), sums);
}
