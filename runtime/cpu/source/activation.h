/* The gated activation, operation by operation as the GPU's kernels have it. */
#pragma once
#include "lanes.h"

#define SILU 0
#define GELU_TANH 2
#define RELU 3
#define CLAMPED_SWIGLU 4
#define BOUNDED_SILU 6

INLINE float exponential(float x) {
  float t = x < -87.f ? -87.f : x;
  t = t > 88.f ? 88.f : t;
  float lifted = __builtin_fmaf(t, 1.44269504f, 12582912.f), n = lifted - 12582912.f;
  float r = __builtin_fmaf(n, -0.693359375f, t);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500E-4f;
  p = __builtin_fmaf(p, r, 1.3981999507E-3f);
  p = __builtin_fmaf(p, r, 8.3334519073E-3f);
  p = __builtin_fmaf(p, r, 4.1665795894E-2f);
  p = __builtin_fmaf(p, r, 1.6666665459E-1f);
  p = __builtin_fmaf(p, r, 5.0000001201E-1f);
  p = __builtin_fmaf(p, r * r, r);
  p = p + 1.f;
  uint32_t bits;
  memcpy(&bits, &lifted, sizeof bits); /* n is in the low bits of what was lifted by 1.5 * 2^23 */
  float result = p * float_of((bits + 127) << 23);
  return x != x ? x : result;
}

INLINE float sigmoid(float z) { return 1.f / (1.f + exponential(-z)); }

INLINE float activated(float gate, float up) {
#if ACTIVATION == CLAMPED_SWIGLU /* as minimum and maximum on a GPU, a NaN gives way to the limit */
  gate = gate < 7.f ? gate : 7.f;
  up = up > -7.f ? up : -7.f;
  up = (up < 7.f ? up : 7.f) + 1.f;
  return (gate * sigmoid(gate * 1.702f)) * up;
#elif ACTIVATION == BOUNDED_SILU
  gate = gate < GATE_BOUND ? gate : GATE_BOUND;
  up = up > -UP_BOUND ? up : -UP_BOUND;
  up = up < UP_BOUND ? up : UP_BOUND;
  return (gate * sigmoid(gate)) * up;
#elif ACTIVATION == SILU
  return (gate * sigmoid(gate)) * up;
#elif ACTIVATION == GELU_TANH
  float inner = 1.5957691216057308f * __builtin_fmaf((0.044715f * gate) * gate, gate, gate);
  return (gate * sigmoid(inner)) * up;
#elif ACTIVATION == RELU
  return (gate > 0.f ? gate : 0.f) * up;
#else
#error "no such activation"
#endif
}
