// The running softmax of a 64 x N tile (kernels/cuda: weights from the maximum of the blocks before): FFMA, EX2, FADD and half an
// F2FP per element, then a vote on the row sums. Scores stay; the next step's weights hang on this one's sums.
template <int N> struct RunningSoftmax {
  float s[N / 2], top[2], sum[2];

  __device__ __forceinline__ void start(u32 seed) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] = (float)(hash(seed + i * 977u) >> 8) * (1.0f / 16777216.0f);
    top[0] = top[1] = 1.0f;
    sum[0] = sum[1] = 0.0f;
  }
  __device__ __forceinline__ void step(float scale) {
    float shift[2] = {top[0] * scale, top[1] * scale}, part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N / 2; i += 2) {
      const int r = (i >> 1) & 1;
      float x = exp2_fast(s[i] * scale - shift[r]), y = exp2_fast(s[i + 1] * scale - shift[r]);
      part[r] += x;
      part[2 + r] += y;
      asm volatile("" :: "r"(pack_fp16(y, x)));
    }
    const float low = part[0] + part[2], high = part[1] + part[3];
    if (__all_sync(0xffffffffu, low <= 1024.0f && high <= 1024.0f)) {
      sum[0] = fmaf(low, 1e-6f, sum[0]), sum[1] = fmaf(high, 1e-6f, sum[1]);
      top[0] = 1.0f + sum[0], top[1] = 1.0f + sum[1];
    } else {
      top[0] += low, top[1] += high;
    }
  }
  __device__ __forceinline__ float total() { return top[0] + top[1] + sum[0] + sum[1]; }
};

