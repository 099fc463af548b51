// One hand-over of a word of shared memory a kernel: written by some threads, read by others, ordered by what the kernel's name says.
// Every one is ordered by the PTX memory model, but two: `nothing` is a race, and `.._in_step` lacks the barrier of a warp that the
// assembler leaves out where it knows that lanes are in step. hand_overs.py runs them under racecheck.

#define DEVICE __device__ __forceinline__
constexpr int READERS = 128;  // a partition of four warps; one warp more writes
constexpr int OLD = 7, NEW = 11;

struct Shared {
  unsigned long long barrier;
  int word;
};

DEVICE unsigned at(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }
DEVICE void write(int* word, int value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at(word)), "r"(value) : "memory"); }
DEVICE int read(int* word) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at(word)) : "memory");
  return value;
}
DEVICE void arrive(Shared& shared) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at(&shared.barrier)) : "memory");
}
DEVICE void wait(Shared& shared) {
  asm volatile(
      "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0; @!done bra AGAIN; }" ::"r"(at(&shared.barrier))
      : "memory");
}
DEVICE void warp_barrier() { asm volatile("bar.warp.sync -1;" ::: "memory"); }
DEVICE bool first_of(int threads) { return threadIdx.x % threads == 0; }
DEVICE bool reads() { return threadIdx.x < READERS; }

// The word and an mbarrier of `arrivals`, there for all.
DEVICE void begin(Shared& shared, int arrivals) {
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(&shared.barrier)), "r"(arrivals) : "memory");
    shared.word = OLD;
  }
  __syncthreads();
}

#define KERNEL(name, arrivals)                                        \
  DEVICE void name##_ordered(Shared& shared, int* out);               \
  extern "C" __global__ void name(int* out) {                         \
    __shared__ Shared shared;                                         \
    begin(shared, arrivals);                                          \
    name##_ordered(shared, out);                                      \
  }                                                                   \
  DEVICE void name##_ordered(Shared& shared, int* out)

// A word that is written, then read.
#define WRITTEN_THEN_READ(name, arrivals, handed, awaited)            \
  KERNEL(name, arrivals) {                                            \
    if (reads()) {                                                    \
      awaited;                                                        \
      out[threadIdx.x] = read(&shared.word) == NEW;                   \
    } else {                                                          \
      handed;                                                         \
      __nanosleep(100);                                               \
    }                                                                 \
  }

// A word that is read, then written.
#define READ_THEN_WRITTEN(name, arrivals, handed, awaited)            \
  KERNEL(name, arrivals) {                                            \
    if (reads()) {                                                    \
      out[threadIdx.x] = read(&shared.word) == OLD;                   \
      handed;                                                         \
    } else {                                                          \
      awaited;                                                        \
      write(&shared.word, NEW);                                       \
    }                                                                 \
  }

#define BARRIER(text) asm volatile(text ";" ::: "memory")

WRITTEN_THEN_READ(written_then_barrier_of_the_cta, 1, write(&shared.word, NEW); BARRIER("barrier.sync 0"), BARRIER("barrier.sync 0"))
WRITTEN_THEN_READ(written_then_barrier_1, 1, write(&shared.word, NEW); BARRIER("barrier.sync 1"), BARRIER("barrier.sync 1"))
WRITTEN_THEN_READ(written_then_barrier_1_of_160, 1, write(&shared.word, NEW); BARRIER("barrier.sync 1, 160"),
                  BARRIER("barrier.sync 1, 160"))
WRITTEN_THEN_READ(written_by_one_then_barrier_1, 1, if (first_of(32)) write(&shared.word, NEW); BARRIER("barrier.sync 1"),
                  BARRIER("barrier.sync 1"))
WRITTEN_THEN_READ(written_then_aligned_barrier_1, 1, write(&shared.word, NEW); BARRIER("bar.sync 1"), BARRIER("bar.sync 1"))
WRITTEN_THEN_READ(written_then_named_arrival, 1, write(&shared.word, NEW); BARRIER("bar.arrive 8, 160"), BARRIER("bar.sync 8, 160"))
WRITTEN_THEN_READ(written_by_lanes_then_one_arrives, 1, write(&shared.word, NEW); warp_barrier(); if (first_of(32)) arrive(shared),
                  wait(shared))
WRITTEN_THEN_READ(written_by_lanes_then_one_arrives_in_step, 1, write(&shared.word, NEW); if (first_of(32)) arrive(shared),
                  wait(shared))
WRITTEN_THEN_READ(written_by_the_one_that_arrives, 1, if (first_of(32)) { write(&shared.word, NEW); arrive(shared); }, wait(shared))
WRITTEN_THEN_READ(written_by_lanes_that_all_arrive, 32, write(&shared.word, NEW); arrive(shared), wait(shared))
READ_THEN_WRITTEN(read_then_barrier_1, 1, BARRIER("barrier.sync 1"), BARRIER("barrier.sync 1"))
READ_THEN_WRITTEN(read_then_barrier_1_of_160, 1, BARRIER("barrier.sync 1, 160"), BARRIER("barrier.sync 1, 160"))
READ_THEN_WRITTEN(read_then_named_arrival, 1, BARRIER("bar.arrive 9, 160"), BARRIER("bar.sync 9, 160"))
READ_THEN_WRITTEN(read_then_partitions_barrier_then_one_arrives, 1, BARRIER("bar.sync 2, 128"); if (threadIdx.x == 0) arrive(shared),
                  wait(shared))
READ_THEN_WRITTEN(read_then_one_of_each_warp_arrives, 4, warp_barrier(); if (first_of(32)) arrive(shared), wait(shared))
READ_THEN_WRITTEN(read_then_one_of_each_warp_arrives_in_step, 4, if (first_of(32)) arrive(shared), wait(shared))
READ_THEN_WRITTEN(read_then_all_arrive, 128, arrive(shared), wait(shared))

// The control: a race, which a pause makes come out right.
WRITTEN_THEN_READ(nothing, 1, write(&shared.word, NEW), __nanosleep(20000))
