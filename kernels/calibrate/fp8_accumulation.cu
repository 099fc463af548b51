// D = C + A B^T of one CTA's 64 x 32 problem by wgmma m64n32k32, e4m3 to fp32, one instruction after the other.
// A (64, 128) and B (32, 128) are bytes, of which the first 32 * steps columns count; C and D are (64, 32).
extern "C" __global__ void __launch_bounds__(128, 1) multiply(const unsigned char* A, const unsigned char* B, const float* C, float* D,
                                                              long long steps) {
  __shared__ __align__(1024) unsigned char a[64 * 128], b[32 * 128];
  A += (long long)blockIdx.x * sizeof(a), B += (long long)blockIdx.x * sizeof(b);
  C += (long long)blockIdx.x * 64 * 32, D += (long long)blockIdx.x * 64 * 32;
  // Rows of 128 bytes, 16-byte chunks exchanged by the row's number in a group of eight: the 128-byte swizzle.
  for (int i = threadIdx.x; i < (int)sizeof(a); i += 128) a[i & ~127 | (i & 127 ^ (i / 128 % 8) * 16)] = A[i];
  for (int i = threadIdx.x; i < (int)sizeof(b); i += 128) b[i & ~127 | (i & 127 ^ (i / 128 % 8) * 16)] = B[i];
  fence_async();
  __syncthreads();
  // A thread has rows r and r + 8 of its warp's 16, columns 8 g + {0, 1} + 2 (lane % 4).
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float d[16];
  for (int i = 0; i < 16; ++i) d[i] = C[(row + i / 2 % 2 * 8) * 32 + i / 4 * 8 + column + i % 2];
  for (int step = 0; step < steps; ++step) {
    wgmma_fence();
    Wgmma<32>::ss(d, descriptor(a, 16, 1024) + step * 2, descriptor(b, 16, 1024) + step * 2, 1);
    wgmma_commit();
    wgmma_wait<0>();
  }
  for (int i = 0; i < 16; ++i) D[(row + i / 2 % 2 * 8) * 32 + i / 4 * 8 + column + i % 2] = d[i];
}
