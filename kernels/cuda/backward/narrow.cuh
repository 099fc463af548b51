// Pairs of 16-bit values as fp32.
#pragma once
#include "bulk.cuh"

template <bool BF16_> __device__ __forceinline__ float2 unpack(u32 both) {
  if constexpr (BF16_) return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
  float low, high;
  asm("{\n\t.reg .f16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}" : "=f"(low), "=f"(high) : "r"(both));
  return make_float2(low, high);
}

// Two products of bf16.
__device__ __forceinline__ u32 product(u32 a, u32 b) {
  u32 both;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
}
