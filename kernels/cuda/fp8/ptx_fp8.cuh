// The PTX instructions that only the FP8 kernels use.
#pragma once
#include "ptx.cuh"

// Four e4m3 values in one register, `a` in the lowest byte; what is above 448 becomes 448, NaN stays NaN.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u32 four;
  asm("{\n\t.reg .b16 low, high;\n\tcvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\tcvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
      "mov.b32 %0, {low, high};\n\t}"
      : "=r"(four)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}
// 2^x along straight lines between powers of two, on the FMA pipe: within -3.9 and +2.1 %, 0 in the mean. First (9 - x) / 256 + 1/2 from
// x = s / 256 slope + .., in [1/2, 1] where all bits below the exponent count equally, and clamped to 1 where x < -119: the share
// below 1/2 that x > 9 leaves is seen in the bits. Then those bits, 128-fold, are taken from those of 2^9.
__device__ __forceinline__ u32 line_position(float s, float slope, float offset) {
  float position;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(position) : "f"(s), "f"(slope), "f"(offset));
  return __float_as_uint(position);
}
__device__ __forceinline__ float line_weight(u32 position) {
  constexpr u32 MEAN = 473000;  // 0.0564 of an octave: no bias in the mean
  u32 weight;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(weight) : "r"(position), "n"(-128), "n"((136u << 23) + (0x3f000000u << 7) - MEAN));
  return __uint_as_float(weight);
}
// Four 8 x 8 matrices of 16-bit values from shared memory, each transposed; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row_address)
               : "memory");
}
// Four of the eight bytes of b:a, chosen by the nibbles of `which`.
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 which) {
  u32 four;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(a), "r"(b), "r"(which));
  return four;
}
// A K-major matrix in shared memory whose rows of ROW_BYTES are swizzled over themselves (PTX ISA, "Matrix descriptor").
template <int ROW_BYTES> __device__ __forceinline__ u64 swizzled_descriptor(const void* tile) {
  static_assert(ROW_BYTES == 128 || ROW_BYTES == 64 || ROW_BYTES == 32, "the 128-byte, the 64-byte or the 32-byte swizzle");
  constexpr u64 SWIZZLE = ROW_BYTES == 128 ? 1 : ROW_BYTES == 64 ? 2 : 3;
  return (u64)((smem_address(tile) & 0x3ffff) >> 4) | ((u64)(8 * ROW_BYTES >> 4) << 32) | (SWIZZLE << 62);
}
