// Quantize one block of columns, left to right:
//
//     code_k = clamp(rint(target_k / scale) + zero, 0, top), or with -DTABLE
//     code_k = how many of the midpoints between a table's values are below target_k / scale
//     error_k = weight_k - level[code_k]
//     left_k = target_k - level[code_k]
//     target_j += error_k * upper[k, j]         for the columns j > k
//
// A warp takes a row. Lane l holds the targets of the columns l, l + 32, ... in
// registers; the error of each column goes to all lanes by one shuffle. Products and
// sums are rounded one by one, so that the result is the twin's bit for bit.
//
// Layout: target, weight [rows, columns] and upper [columns, columns] with a stride
// between rows; scale, zero [rows]; level [rows, levels]; middle [levels - 1], only of a
// table; code, error, left [rows, columns].
// -DCHUNKS=ceil(columns / 32), at most 8. Block: 128 threads, 4 rows.
// Alone: nvcc -DCHUNKS=4 -cubin sweep.cu

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
sweep(const float *target, long long target_stride,
      const float *weight, long long weight_stride,
      const float *upper, long long upper_stride,
      const float *scale, const float *zero, const float *level, const float *middle,
      unsigned char *code, float *error, float *left,
      long long rows, long long columns, long long levels)
{
    const int lane = threadIdx.x % WARP;
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;  // a whole warp leaves: the others share nothing with it

    float goal[CHUNKS], own[CHUNKS];
    for (int c = 0; c < CHUNKS; ++c) {
        const long long column = c * WARP + lane;
        const bool inside = column < columns;
        goal[c] = inside ? target[row * target_stride + column] : 0.0f;
        own[c] = inside ? weight[row * weight_stride + column] : 0.0f;
    }
    const float inverse = __fdiv_rn(1.0f, scale[row]);
    const float shift = zero[row];

#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        for (int turn = 0; turn < WARP; ++turn) {
            const long long k = c * WARP + turn;
            if (k >= columns) return;
            float wrong = 0.0f;
            if (lane == turn) {
                const long long kept =
                    code_of(__fmul_rn(goal[c], inverse), shift, middle, levels);
                const float nearest = level[row * levels + kept];
                wrong = __fsub_rn(own[c], nearest);
                code[row * columns + k] = (unsigned char)kept;
                error[row * columns + k] = wrong;
                left[row * columns + k] = __fsub_rn(goal[c], nearest);
            }
            wrong = __shfl_sync(ALL, wrong, turn);
#pragma unroll
            for (int later = c; later < CHUNKS; ++later) {
                const long long j = later * WARP + lane;
                if (j > k && j < columns)
                    goal[later] = __fadd_rn(
                        goal[later], __fmul_rn(wrong, upper[k * upper_stride + j]));
            }
        }
    }
}
