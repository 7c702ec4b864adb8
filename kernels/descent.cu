// One pass of coordinate descent over the codes of a block of columns:
//
//     code_k = clamp(rint((level[code_k] + pull_k / hessian[k, k]) / scale) + zero, 0, top)
//     pull_j -= (level[new code_k] - level[old code_k]) * hessian[k, j]     for j > k
//
// or, with -DTABLE, to the code by the midpoints of a table, as in sweep.cu; so are the
// warp for a row, layout, CHUNKS and the block.
// Alone: nvcc -DCHUNKS=4 -cubin descent.cu

static_assert(CHUNKS >= 1 && CHUNKS <= 8, "256 columns at most lie in registers");

constexpr int WARP = 32;
constexpr int ROWS = 4;
constexpr unsigned ALL = 0xffffffffu;

__device__ inline long long code_of(float x, float zero, const float *middle, long long levels)
{
#ifdef TABLE
    long long code = 0;
    for (long long m = 0; m + 1 < levels; ++m) code += x > middle[m];
    return code;
#else
    const float step = __fadd_rn(rintf(x), zero);
    return (long long)fminf(fmaxf(step, 0.0f), (float)(levels - 1));
#endif
}

extern "C" __global__ void __launch_bounds__(ROWS * WARP)
descent(const unsigned char *old_code, long long code_stride,
        const float *pull, long long pull_stride,
        const float *hessian, long long hessian_stride,
        const float *scale, const float *zero, const float *level, const float *middle,
        unsigned char *code, long long rows, long long columns, long long levels)
{
    const int lane = threadIdx.x % WARP;
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;

    float left[CHUNKS];
    unsigned char old[CHUNKS];
    for (int c = 0; c < CHUNKS; ++c) {
        const long long column = c * WARP + lane;
        const bool inside = column < columns;
        left[c] = inside ? pull[row * pull_stride + column] : 0.0f;
        old[c] = inside ? old_code[row * code_stride + column] : 0;
    }
    const float inverse = __fdiv_rn(1.0f, scale[row]);
    const float shift = zero[row];

#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        for (int turn = 0; turn < WARP; ++turn) {
            const long long k = c * WARP + turn;
            if (k >= columns) return;
            float step = 0.0f;
            if (lane == turn) {
                const float per = __fdiv_rn(1.0f, hessian[k * hessian_stride + k]);
                // A code that is no level of this row has nothing to be read from.
                const long long from = old[c] < levels ? old[c] : levels - 1;
                const float before = level[row * levels + from];
                const float goal = __fadd_rn(before, __fmul_rn(left[c], per));
                const long long kept =
                    code_of(__fmul_rn(goal, inverse), shift, middle, levels);
                step = __fsub_rn(level[row * levels + kept], before);
                code[row * columns + k] = (unsigned char)kept;
            }
            step = __shfl_sync(ALL, step, turn);
#pragma unroll
            for (int later = c; later < CHUNKS; ++later) {
                const long long j = later * WARP + lane;
                if (j > k && j < columns)
                    left[later] = __fsub_rn(
                        left[later], __fmul_rn(step, hessian[k * hessian_stride + j]));
            }
        }
    }
}
