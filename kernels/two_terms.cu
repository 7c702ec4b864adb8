// The two bf16 terms of w x, w a weight of each row:
//
//     high = bf16(w x),  low = bf16(w x - high)
//
// rounded half to even. Of bf16 x and w both together are exact: 16 significant bits.
//
// Layout: x [rows, columns], fp32, or bf16 with -DBF16, row r from x + r stride; weight
// [rows] fp32, or null for 1; high, low [rows, columns] bf16, contiguous. A block takes
// one row. Alone: nvcc -cubin terms.cu

constexpr int EACH = 8;  // columns of a thread's step: 16 bytes of bf16

typedef unsigned short Short;

struct alignas(16) Shorts { Short part[EACH]; };

__device__ inline float widened(Short x) { return __uint_as_float((unsigned)x << 16); }

__device__ inline Short narrowed(float x)
{
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Short)((bits >> 16) | 0x40u);  // NaN
    return (Short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#ifdef BF16
typedef Short Number;
__device__ inline float as_float(Short x) { return widened(x); }
#else
typedef float Number;
__device__ inline float as_float(float x) { return x; }
#endif

struct alignas(16) Numbers { Number part[EACH]; };

__device__ inline bool by_sixteen(const void *at) { return (unsigned long long)at % 16 == 0; }

extern "C" __global__ void two_terms(const Number *x, long long stride, const float *weight,
                                     Short *high, Short *low, long long rows,
                                     long long columns)
{
    const long long row = blockIdx.x;
    if (row >= rows) return;
    x += row * stride;
    high += row * columns;
    low += row * columns;
    const float scale = weight ? weight[row] : 1.0f;
    const bool whole = by_sixteen(x) && by_sixteen(high) && by_sixteen(low);
    const long long vectors = whole ? columns / EACH : 0;
    for (long long at = threadIdx.x; at < vectors; at += blockDim.x) {
        const Numbers given = ((const Numbers *)x)[at];
        Shorts upper, lower;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float value = __fmul_rn(scale, as_float(given.part[i]));
            upper.part[i] = narrowed(value);
            lower.part[i] = narrowed(__fsub_rn(value, widened(upper.part[i])));
        }
        ((Shorts *)high)[at] = upper;
        ((Shorts *)low)[at] = lower;
    }
    for (long long at = vectors * EACH + threadIdx.x; at < columns; at += blockDim.x) {
        const float value = __fmul_rn(scale, as_float(x[at]));
        high[at] = narrowed(value);
        low[at] = narrowed(__fsub_rn(value, widened(high[at])));
    }
}
