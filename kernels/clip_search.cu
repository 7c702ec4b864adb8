// Which candidate scale rounds a row of weights best:
//
//     error(p) = sum over c of |t_c - s_p (clamp(rint(t_c / s_p), -z, top - z))|^exponent
//
// or, with -DTABLE, of |t_c - s_p v|^exponent, v the table's value nearest to t_c / s_p;
// and, if mirrored, the same for -s_p. The least error wins, the earlier candidate on a
// tie, the upright grid before the mirrored one; best[row] = p, or -1 - p for a mirror.
//
// A warp takes a row; lane l tries the candidates l, l + 32, ..., upright and mirrored,
// and adds each error from the first column to the last, as the twin does.
//
// Layout: target [rows, columns] with a stride; scale [rows, candidates]; zero, best [rows];
// of a table value [top + 1] and middle [top], the midpoints between its values.
// -DCHUNKS=ceil(candidates / 32), at most 8. Block: 128 threads, 4 rows.
// Alone: nvcc -DCHUNKS=3 -cubin clip_search.cu

static_assert(CHUNKS >= 1 && CHUNKS <= 8, "256 candidates at most");

constexpr int WARP = 32;
constexpr int ROWS = 4;
constexpr unsigned ALL = 0xffffffffu;
constexpr long long NONE = 1LL << 40;

struct Levels {
    const float *value, *middle;
    long long top;
};

__device__ inline float nearest(float x, float low, float high, const Levels &levels)
{
#ifdef TABLE
    long long code = 0;
    for (long long m = 0; m < levels.top; ++m) code += x > levels.middle[m];
    return levels.value[code];
#else
    return rintf(fminf(fmaxf(x, low), high));
#endif
}

// The mirror of a table is another scale; that of whole numbers has other bounds.
__device__ inline float error_of(float t, float scale, float inverse, float low, float high,
                                 const Levels &levels, bool squared, float half)
{
    const float x = nearest(__fmul_rn(t, inverse), low, high, levels);
    const float e = __fsub_rn(t, __fmul_rn(scale, x));
    const float square = __fmul_rn(e, e);
    return squared ? square : powf(square, half);
}

extern "C" __global__ void __launch_bounds__(ROWS * WARP)
clip_search(const float *target, long long target_stride,
            const float *scale, const float *zero, const float *value,
            const float *middle, long long *best,
            long long rows, long long columns, long long candidates,
            long long top, float exponent, long long mirrored)
{
    const int lane = threadIdx.x % WARP;
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;

    const float low = -zero[row];
    const float high = (float)top - zero[row];
    const bool squared = exponent == 2.0f;
    const float half = __fmul_rn(0.5f, exponent);
    const Levels levels = {value, middle, top};
    float own[CHUNKS], inverse[CHUNKS], upright[CHUNKS], mirror[CHUNKS];
    for (int c = 0; c < CHUNKS; ++c) {
        const long long p = c * WARP + lane;
        own[c] = p < candidates ? scale[row * candidates + p] : 1.0f;
        inverse[c] = __fdiv_rn(1.0f, own[c]);
        upright[c] = mirror[c] = 0.0f;
    }
    for (long long column = 0; column < columns; ++column) {
        const float t = target[row * target_stride + column];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            upright[c] = __fadd_rn(
                upright[c],
                error_of(t, own[c], inverse[c], low, high, levels, squared, half));
#ifdef TABLE
            const float turned = -own[c], inverted = -inverse[c];
#else
            const float turned = own[c], inverted = inverse[c];
#endif
            if (mirrored)
                mirror[c] = __fadd_rn(
                    mirror[c],
                    error_of(t, turned, inverted, -high, -low, levels, squared, half));
        }
    }
    // Candidates in the order of their tries: all upright ones, then the mirrored.
    long long choice = NONE;
    float least = 0.0f;
    for (int side = 0; side < (mirrored ? 2 : 1); ++side) {
        for (int c = 0; c < CHUNKS; ++c) {
            const long long p = c * WARP + lane;
            const float found = side ? mirror[c] : upright[c];
            if (p < candidates && (choice == NONE || found < least)) {
                least = found;
                choice = side * candidates + p;
            }
        }
    }
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        const float other = __shfl_xor_sync(ALL, least, apart);
        const long long at = __shfl_xor_sync(ALL, choice, apart);
        const bool first = choice == NONE || other < least || (other == least && at < choice);
        if (at != NONE && first) {
            least = other;
            choice = at;
        }
    }
    if (lane == 0) best[row] = choice < candidates ? choice : candidates - 1 - choice;
}
