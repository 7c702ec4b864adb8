// Attention that each key receives, of bf16 queries and keys: what column_sums.cu gives,
// by tensor cores. Products of bf16 are exact, and sums are fp32.
//
// A block holds 128 rows still, those of a warp as its fragments in registers, and has
// the others come by 64 through shared memory: in `row_bounds` queries meet keys, in
// `column_sums` keys meet queries. So a warp's sums are along its rows, and its alone.
// `row_bounds` gives each query's largest score, in powers of two, and 1 / the sum of
// exp2(score - largest); `column_sums` adds up the products of exp2(score - largest) and
// that. Both compute a score by the same products and sums.
//
// Layout: query [sequences, heads, tokens, width], key [sequences, kv_heads, tokens,
// width] bf16, from multiples of 16 bytes; largest, inverse, sums [sequences, heads,
// tokens] fp32. -DPAD: width, or the next multiple of 16, at most 256.
// Grid: (ceil(tokens / 128), heads, sequences). Block: 256.
// Alone: nvcc -arch=sm_80 -DPAD=128 -cubin column_sums_bf16.cu

static_assert(PAD % 16 == 0 && PAD >= 16 && PAD <= 256, "fragments lie in registers");

constexpr int STILL = 128, MOVING = 64, THREADS = 256, WARP = 32;
constexpr int OWN = 16;                // still rows of a warp
constexpr int STEPS = PAD / 16;        // products to a score's sum
constexpr int PARTS = MOVING / 8;      // products side by side
constexpr int ROW = PAD / 2 + 4;       // words: neighbours use different banks
constexpr int EIGHTS = MOVING * PAD / 8;
constexpr int EACH = (EIGHTS + THREADS - 1) / THREADS;
constexpr int RESIDENT = PAD <= 128 ? 2 : 1;
constexpr float LOG2_E = 1.44269504f;

typedef unsigned short Short;
struct alignas(16) Eight { unsigned pair[4]; };
typedef unsigned Still[STEPS][4];
typedef float Scores[PARTS][4];

__device__ inline float below_all() { return -__uint_as_float(0x7f800000u); }

// d += a b of 16 x 16 and 16 x 8, fragments as PTX has them for mma.m16n8k16.
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
#ifdef HOST_MMA
    HOST_MMA(d, a, b0, b1);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two and eight neighbours of a row; zeros outside.
__device__ inline unsigned two(const Short *x, long long row, long long at,
                               long long tokens, long long width)
{
    if (row >= tokens || at >= width) return 0;
    x += row * width + at;
    if (width % 2 == 0) return *(const unsigned *)x;
    return x[0] | (at + 1 < width ? (unsigned)x[1] << 16 : 0u);
}

__device__ inline Eight eight(const Short *x, long long row, long long at,
                              long long tokens, long long width)
{
    Eight made = {};
    if (row >= tokens || at >= width) return made;
    if (width % 8 == 0) return *(const Eight *)(x + row * width + at);
    for (int i = 0; i < 4; ++i) made.pair[i] = two(x, row, at + 2 * i, tokens, width);
    return made;
}

__device__ inline void take_still(Still &still, const Short *x, long long first,
                                  long long tokens, long long width)
{
    const int lane = threadIdx.x % WARP;
    const long long row = first + lane / 4;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int part = 0; part < 4; ++part)
            still[step][part] = two(x, row + part % 2 * 8,
                                    step * 16 + part / 2 * 8 + lane % 4 * 2, tokens, width);
}

// On their way: read while the tile before is computed.
__device__ inline void fetch(Eight (&coming)[EACH], const Short *x, long long first,
                             long long tokens, long long width)
{
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at < EIGHTS)
            coming[i] = eight(x, first + at / (PAD / 8), at % (PAD / 8) * 8, tokens, width);
    }
}

__device__ inline void put(unsigned (&moving)[MOVING][ROW], const Eight (&coming)[EACH])
{
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at < EIGHTS) *(Eight *)&moving[at / (PAD / 8)][at % (PAD / 8) * 4] = coming[i];
    }
}

// A thread's scores: still rows lane / 4 and that + 8, moving rows 8 part + 2 (lane % 4)
// and the next.
__device__ inline void score_tile(Scores &score, const Still &still,
                                  const unsigned (&moving)[MOVING][ROW], float scaling)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[part][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const unsigned *row = &moving[part * 8 + lane / 4][step * 8 + lane % 4];
            multiply(score[part], still[step], row[0], row[4]);
        }
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i)  // rounded: fused into a difference, it were another score
            score[part][i] = __fmul_rn(score[part][i], scaling);
}

__device__ inline bool sees(long long query, long long key, long long tokens, long long window)
{
    return query < tokens && key <= query && (window == 0 || query - key < window);
}

struct Place {
    long long own, shared;  // of this head's queries and keys, in rows of tokens
};

__device__ inline Place place(long long heads, long long kv_heads)
{
    const long long head = blockIdx.y, sequence = blockIdx.z;
    return {sequence * heads + head, sequence * kv_heads + head / (heads / kv_heads)};
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
row_bounds(const Short *query, const Short *key, float *largest, float *inverse,
           long long heads, long long kv_heads, long long tokens, long long width,
           float scaling, long long window)
{
    __shared__ unsigned moving[MOVING][ROW];
    const Place at = place(heads, kv_heads);
    query += at.own * tokens * width;
    key += at.shared * tokens * width;
    scaling *= LOG2_E;
    // The last rows see the most keys: they begin first.
    const long long first = (long long)(gridDim.x - 1 - blockIdx.x) * STILL;
    const long long own = first + threadIdx.x / WARP * OWN;
    const int lane = threadIdx.x % WARP;
    const long long to = first + STILL < tokens ? first + STILL : tokens;
    long long from = window == 0 ? 0 : first - window + 1;
    from = from < 0 ? 0 : from / MOVING * MOVING;

    Still still;
    take_still(still, query, own, tokens, width);
    Eight coming[EACH];
    fetch(coming, key, from, tokens, width);
    float best[2] = {below_all(), below_all()}, sum[2] = {};
    for (long long start = from; start < to; start += MOVING) {
        __syncthreads();
        put(moving, coming);
        __syncthreads();
        fetch(coming, key, start + MOVING, tokens, width);
        Scores score;
        score_tile(score, still, moving, scaling);
        const bool whole = start + MOVING <= own + 1 && own + OWN <= tokens &&
                           (window == 0 || own + OWN - 1 - start < window);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const long long row = own + lane / 4 + 8 * side;
            float most = best[side];
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int i = 2 * side; i < 2 * side + 2; ++i) {
                    const long long column = start + part * 8 + lane % 4 * 2 + i % 2;
                    if (!whole && !sees(row, column, tokens, window))
                        score[part][i] = below_all();
                    most = fmaxf(most, score[part][i]);
                }
            if (most == below_all()) continue;
            sum[side] *= exp2f(best[side] - most);
            best[side] = most;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
#pragma unroll
                for (int i = 2 * side; i < 2 * side + 2; ++i)
                    sum[side] += exp2f(score[part][i] - most);
        }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float most = best[side];
        for (int apart = 1; apart < 4; apart *= 2)
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
        float mass = sum[side] > 0.0f ? sum[side] * exp2f(best[side] - most) : 0.0f;
        for (int apart = 1; apart < 4; apart *= 2)
            mass += __shfl_xor_sync(0xffffffffu, mass, apart);
        const long long row = own + lane / 4 + 8 * side;
        if (lane % 4 == 0 && row < tokens) {
            largest[at.own * tokens + row] = most;
            inverse[at.own * tokens + row] = 1.0f / mass;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
column_sums(const Short *query, const Short *key, const float *largest, const float *inverse,
            float *sums, long long heads, long long kv_heads, long long tokens,
            long long width, float scaling, long long window)
{
    __shared__ unsigned moving[MOVING][ROW];
    __shared__ float most_of[MOVING], share_of[MOVING];
    const Place at = place(heads, kv_heads);
    query += at.own * tokens * width;
    key += at.shared * tokens * width;
    largest += at.own * tokens;
    inverse += at.own * tokens;
    scaling *= LOG2_E;
    const long long first = (long long)blockIdx.x * STILL;
    const long long own = first + threadIdx.x / WARP * OWN;
    const int lane = threadIdx.x % WARP;
    long long to = window == 0 ? tokens : first + STILL + window;
    to = to < tokens ? to : tokens;

    Still still;
    take_still(still, key, own, tokens, width);
    Eight coming[EACH];
    fetch(coming, query, first, tokens, width);
    float sum[2] = {};
    for (long long start = first; start < to; start += MOVING) {
        __syncthreads();
        put(moving, coming);
        if (threadIdx.x < MOVING) {
            const long long row = start + threadIdx.x;
            most_of[threadIdx.x] = row < tokens ? largest[row] : 0.0f;
            share_of[threadIdx.x] = row < tokens ? inverse[row] : 0.0f;
        }
        __syncthreads();
        fetch(coming, query, start + MOVING, tokens, width);
        Scores score;
        score_tile(score, still, moving, scaling);
        const bool whole = start >= own + OWN - 1 && start + MOVING <= tokens &&
                           (window == 0 || start + MOVING - 1 - own < window);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = part * 8 + lane % 4 * 2 + i % 2;
                const long long row = own + lane / 4 + i / 2 * 8;
                if (whole || sees(start + column, row, tokens, window))
                    sum[i / 2] += exp2f(score[part][i] - most_of[column]) * share_of[column];
            }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        for (int apart = 1; apart < 4; apart *= 2)
            sum[side] += __shfl_xor_sync(0xffffffffu, sum[side], apart);
        const long long row = own + lane / 4 + 8 * side;
        if (lane % 4 == 0 && row < tokens) sums[at.own * tokens + row] = sum[side];
    }
}
