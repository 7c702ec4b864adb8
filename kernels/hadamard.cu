// Hadamard product of each run of DENSE * 2^LOG entries:
//
//     y = x (M kron S) / sqrt(DENSE 2^LOG)
//
// with Sylvester's S of order 2^LOG and a small Hadamard matrix M of order DENSE. The
// entries of some rows lie in shared memory, one float of padding after each 32, so that
// threads 8 entries apart use different banks. S goes in passes of up to 8 entries a
// thread; M last, with its signs compiled in.
//
// Layout: input, output [rows, DENSE 2^LOG], fp32, or bf16 with -DBF16 (computed in
// fp32). -DLOG, -DDENSE <= 64, -DSIGNS=bit masks: bit d' of mask d is set where M[d, d']
// is -1. -DROWS rows a block. Shared: 4 (ROWS n + ROWS n / 32 + 1) bytes. Block: 256.
// Alone: nvcc -DLOG=7 -DDENSE=1 -DSIGNS=0 -DROWS=8 -cubin hadamard.cu

static_assert(DENSE >= 1 && DENSE <= 64, "a mask of signs has 64 bits");
static_assert(LOG >= 0 && LOG <= 16 && ROWS >= 1, "a run lies in shared memory");

constexpr int THREADS = 256;
constexpr long long POWER = 1LL << LOG;
constexpr long long WIDTH = DENSE * POWER;
constexpr unsigned long long MASKS[DENSE] = {SIGNS};

#ifdef BF16
typedef unsigned short Number;
__device__ inline float widened(Number x) { return __uint_as_float((unsigned)x << 16); }
__device__ inline Number narrowed(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Number)((bits >> 16) | 0x40u);  // NaN
    return (Number)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // half to even
}
#else
typedef float Number;
__device__ inline float widened(Number x) { return x; }
__device__ inline Number narrowed(float x) { return x; }
#endif

extern __shared__ float pool[];

__device__ inline float &place(long long at) { return pool[at + (at >> 5)]; }

// The butterflies of the index bits START .. START + RADIX - 1, all segments at once.
template <int START, int RADIX>
__device__ inline void butterflies(long long entries)
{
    constexpr int COUNT = 1 << RADIX;
    for (long long job = threadIdx.x; job < entries >> RADIX; job += THREADS) {
        const long long low = job & ((1LL << START) - 1), high = job >> START;
        const long long base = (high << (START + RADIX)) | low;
        float v[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) v[i] = place(base + ((long long)i << START));
#pragma unroll
        for (int bit = 1; bit < COUNT; bit *= 2)
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (!(i & bit)) {
                    const float a = v[i], b = v[i | bit];
                    v[i] = a + b;
                    v[i | bit] = a - b;
                }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) place(base + ((long long)i << START)) = v[i];
    }
    __syncthreads();
}

template <int START>
__device__ inline void all_butterflies(long long entries)
{
    if constexpr (START < LOG) {
        constexpr int RADIX = LOG - START < 3 ? LOG - START : 3;
        butterflies<START, RADIX>(entries);
        all_butterflies<START + RADIX>(entries);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
hadamard(const Number *input, Number *output, long long rows, float scale)
{
    const long long first = (long long)blockIdx.x * ROWS;
    const long long here = rows - first < ROWS ? rows - first : ROWS;
    const long long entries = here * WIDTH;
    input += first * WIDTH;
    output += first * WIDTH;
    for (long long at = threadIdx.x; at < entries; at += THREADS)
        place(at) = widened(input[at]);
    __syncthreads();
    all_butterflies<0>(entries);
    for (long long job = threadIdx.x; job < here * POWER; job += THREADS) {
        const long long base = job / POWER * WIDTH + job % POWER;
        float v[DENSE];
#pragma unroll
        for (int d = 0; d < DENSE; ++d) v[d] = place(base + d * POWER);
#pragma unroll
        for (int made = 0; made < DENSE; ++made) {
            float sum = 0.0f;
#pragma unroll
            for (int d = 0; d < DENSE; ++d)
                sum += (MASKS[d] >> made) & 1 ? -v[d] : v[d];
            output[base + made * POWER] = narrowed(sum * scale);
        }
    }
}
