// Hadamard product of each run of DENSE * 2^LOG entries:
//
//     y = x (M kron S) / sqrt(DENSE 2^LOG)
//
// with Sylvester's S of order 2^LOG and a small Hadamard matrix M of order DENSE, its
// signs compiled in. The entries of a block's rows lie in shared memory, in chunks of
// 1024, and take two steps there:
//
// 1. A warp takes a chunk from memory and applies S to the lower 10 bits of the index,
//    5 in registers, the other 5 after one exchange inside of the chunk.
// 2. After the one barrier, a thread takes whole columns, entries that differ in the bits
//    above those and in M's index, and writes their results. Where there is neither, the
//    warp writes its chunk as it was read.
//
// Layout: input, output [rows, DENSE 2^LOG], from multiples of 16 bytes, fp32, or bf16
// with -DBF16 (computed in fp32). -DLOG, -DDENSE, 1 or a multiple of 4, -DSIGNS=bit masks:
// bit d' of mask d is set where M[d, d'] is -1. -DROWS rows a block. With CHUNKS for
// ceil(ROWS DENSE 2^LOG / 1024), shared: 4096 CHUNKS bytes. Block: 32 min(CHUNKS, 8), but
// 512 above 28 chunks, where an SM holds one block.
// Alone: nvcc -DLOG=7 -DDENSE=1 -DSIGNS=0 -DROWS=64 -cubin hadamard.cu

static_assert(DENSE >= 1 && DENSE <= 64, "a mask of signs has 64 bits");
static_assert(DENSE == 1 || DENSE % 4 == 0, "no Hadamard matrix has another order, but 2");
static_assert(LOG >= 0 && LOG <= 16 && ROWS >= 1, "a run lies in shared memory");

constexpr int WARP = 32;
constexpr int CHUNK_LOG = 10;
constexpr int CHUNK = 1 << CHUNK_LOG;
constexpr int VECTOR = 4;  // entries of one load: 16 bytes of fp32, 8 of bf16
constexpr unsigned WIDTH = (unsigned)DENSE << LOG;
constexpr int EACH = CHUNK / WARP;  // of a chunk, a lane's entries
constexpr int VECTORS = EACH / VECTOR;
constexpr int STEP = VECTOR * WARP;
static_assert(ROWS * WIDTH % VECTOR == 0, "blocks begin at whole vectors");

constexpr int CHUNKS = (ROWS * WIDTH + CHUNK - 1) / CHUNK;
constexpr int THREADS = WARP * (CHUNKS < 8 ? CHUNKS : CHUNKS <= 28 ? 8 : 16);

// Of a row, 2^LOW columns of COLUMN entries; a thread takes SIDE neighbours at once, as
// many as registers allow, so that its accesses are wide.
constexpr int LOW = LOG < CHUNK_LOG ? LOG : CHUNK_LOG;
constexpr int TOP = 1 << (LOG - LOW);
constexpr int COLUMN = DENSE * TOP;
constexpr int WANTED = COLUMN <= 8 ? 4 : COLUMN <= 28 ? 2 : 1;
constexpr int SIDE = WANTED < (1 << LOW) ? WANTED : 1 << LOW;
// More blocks cover each other's latency, as far as their registers go.
constexpr int RESIDENT = (COLUMN * SIDE <= 32 ? 1024 : 512) / THREADS;
// With few blocks, and registers to spare, a warp loads its next chunk ahead.
constexpr bool AHEAD = RESIDENT * THREADS <= 512 && CHUNKS * WARP > THREADS;

constexpr unsigned long long MASKS[DENSE] = {SIGNS};

template <class Value, int COUNT> struct alignas(sizeof(Value) * COUNT) Pack {
    Value part[COUNT];
};

#ifdef BF16
typedef unsigned short Number;  // a number's bits
__device__ inline Number narrowed(float x)
{
#if __CUDA_ARCH__ >= 800
    Number rounded;  // half to even: one instruction for seven
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
#else
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Number)((bits >> 16) | 0x40u);  // NaN
    return (Number)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
#else
typedef unsigned Number;
__device__ inline Number narrowed(float x) { return __float_as_uint(x); }
#endif

// Words, not numbers: to part them is to wait for them.
constexpr int SHARE = sizeof(unsigned) / sizeof(Number);
typedef Pack<unsigned, VECTOR / SHARE> Taken;
typedef Pack<Number, VECTOR> Made;

__device__ inline float widened(const Taken &taken, int i)
{
    const unsigned word = taken.part[i / SHARE];
    return __uint_as_float(SHARE == 1 ? word : i % 2 ? word & 0xffff0000u : word << 16);
}

extern __shared__ float pool[];

// Bits 7 to 9 flip bits 2 to 4, so that no access of a warp meets a bank twice.
__device__ inline unsigned place(unsigned at) { return at ^ (at >> 5 & 28); }

template <int COUNT> __device__ inline Pack<float, COUNT> &packed(unsigned placed)
{
    return *reinterpret_cast<Pack<float, COUNT> *>(&pool[placed]);
}

// Sums and differences over BITS bits of the index of v, from bit FIRST.
template <int FIRST, int BITS, int COUNT> __device__ inline void butterflies(float (&v)[COUNT])
{
#pragma unroll
    for (int bit = 1 << FIRST; bit < 1 << (FIRST + BITS); bit *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (!(i & bit)) {
                const float a = v[i], b = v[i | bit];
                v[i] = a + b;
                v[i | bit] = a - b;
            }
}

__device__ constexpr int between(int least, int x, int most)
{
    return x < least ? least : x > most ? most : x;
}

// A lane's vectors of a chunk; left counts the entries from its first on. The last chunk
// may be short; whole ones are apart, so that all their loads are under way at once.
__device__ inline void take(const Number *input, int left, bool whole, Taken (&taken)[VECTORS])
{
    if (whole) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            taken[i] = *reinterpret_cast<const Taken *>(input + i * STEP);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = i / VECTOR * STEP + i % VECTOR;
            const unsigned bits = at < left ? input[at] : 0;
            unsigned &word = taken[i / VECTOR].part[i % VECTOR / SHARE];
            word = i % SHARE ? word | bits << 16 : bits;
        }
    }
}

__device__ inline void put(Number *output, int left, bool whole, const float (&v)[EACH])
{
    Made made[VECTORS];
#pragma unroll
    for (int i = 0; i < EACH; ++i) made[i / VECTOR].part[i % VECTOR] = narrowed(v[i]);
    if (whole) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
            *reinterpret_cast<Made *>(output + i * STEP) = made[i];
    } else {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int at = i / VECTOR * STEP + i % VECTOR;
            if (at < left) output[at] = made[i / VECTOR].part[i % VECTOR];
        }
    }
}

// A thread holds the index bits 0, 1 and 7 to 9, as it was given them, then 2 to 6. It
// takes its vectors back where no columns follow.
__device__ inline void transform_chunk(float (&v)[EACH], unsigned chunk)
{
    const unsigned lane = threadIdx.x % WARP, first = chunk + VECTOR * lane;
    butterflies<0, between(0, LOW, 2)>(v);
    butterflies<2, between(0, LOW - 7, 3)>(v);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        Pack<float, VECTOR> part;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) part.part[j] = v[i * VECTOR + j];
        packed<VECTOR>((first ^ i * VECTOR) + i * STEP) = part;  // place(first + i STEP)
    }
    __syncwarp();
    // place(chunk + lane / VECTOR * STEP + i * VECTOR + lane % VECTOR), in few steps.
    const unsigned own = chunk + lane / VECTOR * STEP + lane;
#pragma unroll
    for (int i = 0; i < EACH; ++i) v[i] = pool[(own ^ i % 8 * VECTOR) + i / 8 * WARP];
    butterflies<0, between(0, LOW - 2, 5)>(v);
#pragma unroll
    for (int i = 0; i < EACH; ++i) pool[(own ^ i % 8 * VECTOR) + i / 8 * WARP] = v[i];
    if constexpr (COLUMN > 1) return;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const auto part = packed<VECTOR>((first ^ i * VECTOR) + i * STEP);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) v[i * VECTOR + j] = part.part[j];
    }
}

__device__ inline void transform_chunks(const Number *input, Number *output, unsigned entries,
                                        float scale)
{
    constexpr unsigned NEXT = THREADS * EACH;
    const unsigned lane_at = VECTOR * (threadIdx.x % WARP);
    Taken taken[VECTORS];
    const auto take_of = [&](unsigned chunk) {
        if (chunk < entries)
            take(input + chunk + lane_at, int(entries - chunk - lane_at),
                 chunk + CHUNK <= entries, taken);
    };
    unsigned chunk = threadIdx.x / WARP * CHUNK;
    if (AHEAD) take_of(chunk);
    for (; chunk < entries; chunk += NEXT) {
        if (!AHEAD) take_of(chunk);
        float v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) v[i] = widened(taken[i / VECTOR], i % VECTOR);
        if (AHEAD) take_of(chunk + NEXT);
        transform_chunk(v, chunk);
        if constexpr (COLUMN == 1) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) v[i] *= scale;
            put(output + chunk + lane_at, int(entries - chunk - lane_at),
                chunk + CHUNK <= entries, v);
        }
    }
}

// Adds scale v times four rows of M, from the first on. Outputs share the sums of pairs.
__device__ inline void add_four(float (&sum)[COLUMN * SIDE], int first, int at,
                                const float (&v)[4], float scale)
{
    const float left[2] = {v[0] + v[1], v[0] - v[1]}, right[2] = {v[2] + v[3], v[2] - v[3]};
#pragma unroll
    for (int made = 0; made < DENSE; ++made) {
        bool minus[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) minus[i] = MASKS[(first + i) % DENSE] >> made & 1;
        const float one = left[minus[0] != minus[1]], two = right[minus[2] != minus[3]];
        const float four = minus[0] == minus[2] ? one + two : one - two;
        float &total = sum[made * TOP * SIDE + at];
        total += (minus[0] ? -scale : scale) * four;  // one instruction
    }
}

__device__ inline void transform_columns(Number *output, unsigned job, float scale)
{
    constexpr unsigned JOBS = (1u << LOW) / SIDE;  // of a row
    constexpr int GROUP = DENSE == 1 ? 1 : 4;
    const unsigned base = job / JOBS * WIDTH + job % JOBS * SIDE;
    float sum[COLUMN * SIDE] = {};
#pragma unroll
    for (int first = 0; first < DENSE; first += GROUP)
#pragma unroll
        for (int top = 0; top < TOP; ++top) {
            Pack<float, SIDE> taken[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                const unsigned from = ((first + i) * TOP + top) << LOW;
                // What is added after place is known, and so part of the instruction.
                taken[i] = packed<SIDE>(place(base + from % CHUNK) + from / CHUNK * CHUNK);
            }
#pragma unroll
            for (int side = 0; side < SIDE; ++side)
                if constexpr (GROUP == 1) {
                    sum[top * SIDE + side] = taken[0].part[side] * scale;
                } else {
                    const float v[4] = {taken[0].part[side], taken[1].part[side],
                                        taken[2].part[side], taken[3].part[side]};
                    add_four(sum, first, top * SIDE + side, v, scale);
                }
        }
    constexpr int SIDE_LOG = SIDE / 2;  // of 1, 2, 4
    butterflies<SIDE_LOG, LOG - LOW>(sum);
#pragma unroll
    for (int i = 0; i < COLUMN; ++i) {
        Pack<Number, SIDE> made;
#pragma unroll
        for (int side = 0; side < SIDE; ++side)
            made.part[side] = narrowed(sum[i * SIDE + side]);
        *reinterpret_cast<Pack<Number, SIDE> *>(output + base + (i << LOW)) = made;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
hadamard(const Number *input, Number *output, long long rows, float scale)
{
    const long long row = (long long)blockIdx.x * ROWS;
    const unsigned here = rows - row < ROWS ? rows - row : ROWS;
    const unsigned entries = here * WIDTH;
    input += row * WIDTH;
    output += row * WIDTH;
    transform_chunks(input, output, entries, scale);
    if constexpr (COLUMN > 1) {
        __syncthreads();
        for (unsigned job = threadIdx.x; job < (here << LOW) / SIDE; job += THREADS)
            transform_columns(output, job, scale);
    }
}
