// The nearest E8P codeword to each run of 8 entries of target / scale, as digits:
// value = (2 digit - 11) / 4. What the codewords are: rsq_stream/ops/e8p_codebook.py. How the
// search goes, which is exact: the head of rsq_stream/ops/e8p_loops.py.
//
// A thread takes a run, in fp64 as the twin does, so that both find the same codeword.
//
// Layout: target [rows, columns] with a stride, columns a multiple of 8; scale [rows];
// halves [patterns, 3], the places of the 1/2 in each pattern of norm 12; digit [rows,
// columns]. Block: any number of threads, one for each of rows x columns / 8.
// Alone: nvcc -cubin lattice.cu

constexpr int WIDTH = 8;

struct Vector {
    double entry[WIDTH];
    double distance;  // squared, from x
};

// Puts the nearest h + shift into `best`, if it is nearer than what is there.
__device__ inline void try_shift(const double *x, double shift, const long long *halves,
                                 long long patterns, Vector &best)
{
    double size[WIDTH], whole = 0.0, square = 0.0;
    int order[WIDTH];
    bool odd = false;
    for (int i = 0; i < WIDTH; ++i) {
        double u = __dsub_rn(x[i], shift);
        if (u < 0.0) {
            odd = !odd;
            u = -u;
        }
        size[i] = u;
        whole = __dadd_rn(whole, u);
        square = __dadd_rn(square, __dmul_rn(u, u));
        int at = i;  // descending; of equal sizes the earlier place comes first
        for (; at > 0 && size[order[at - 1]] < u; --at) order[at] = order[at - 1];
        order[at] = i;
    }
    // 2 h u - |h|^2 of k times 3/2, by the parity of k: with all signs or without one.
    const double smallest = 2.0 * size[order[7]];
    const double even_sum = __dsub_rn(whole, odd ? smallest : 0.0);
    const double odd_sum = __dsub_rn(whole, odd ? 0.0 : smallest);
    double score, most = __dsub_rn(even_sum, 2.0), top = 0.0;
    int kind = 0;
    for (int k = 1; k < 5; ++k) {
        top = __dadd_rn(top, size[order[k - 1]]);
        score = __dadd_rn(k & 1 ? odd_sum : even_sum, __dmul_rn(2.0, top));
        score = __dsub_rn(score, 2.0 * (k + 1));
        if (score > most) {
            most = score;
            kind = k;
        }
    }
    const double first = __dmul_rn(4.0, size[order[0]]);
    const double second = __dmul_rn(2.0, size[order[1]]);
    score = __dsub_rn(__dadd_rn(even_sum, first), 8.0);
    if (score > most) {
        most = score;
        kind = 5;
    }
    score = __dsub_rn(__dadd_rn(__dadd_rn(odd_sum, first), second), 10.0);
    if (score > most) {
        most = score;
        kind = 6;
    }
    long long number = -1;
    int flipped = order[7];
    top = __dadd_rn(top, size[order[4]]);
    if (__dsub_rn(__dadd_rn(odd_sum, __dmul_rn(2.0, top)), 12.0) > most) {
        for (long long p = 0; p < patterns; ++p) {
            const long long *place = halves + 3 * p;
            const double three = __dadd_rn(__dadd_rn(size[place[0]], size[place[1]]), size[place[2]]);
            score = __dsub_rn(__dsub_rn(__dmul_rn(3.0, whole), __dmul_rn(2.0, three)), 12.0);
            if (score <= most) continue;
            int at = order[7];
            if (!odd) {  // one sign against u: where it costs least, 4 h_i |u_i|
                double cost = 0.0;
                for (int i = 0; i < WIDTH; ++i) {
                    const bool half = i == place[0] || i == place[1] || i == place[2];
                    const double one = size[i] * (half ? 2.0 : 6.0);
                    if (i == 0 || one < cost) {
                        cost = one;
                        at = i;
                    }
                }
                score = __dsub_rn(score, cost);
            }
            if (score > most) {
                most = score;
                number = p;
                flipped = at;
            }
        }
    }
    const double distance = __dsub_rn(square, most);
    if (!(distance < best.distance)) return;
    best.distance = distance;
    for (int i = 0; i < WIDTH; ++i) best.entry[i] = number >= 0 ? 1.5 : 0.5;
    bool against = odd;
    if (number >= 0) {
        for (int i = 0; i < 3; ++i) best.entry[halves[3 * number + i]] = 0.5;
        against = !odd;
    } else if (kind <= 4) {
        for (int i = 0; i < kind; ++i) best.entry[order[i]] = 1.5;
        if (kind & 1) against = !odd;
    } else {
        best.entry[order[0]] = 2.5;
        if (kind == 6) {
            best.entry[order[1]] = 1.5;
            against = !odd;
        }
    }
    for (int i = 0; i < WIDTH; ++i) {
        bool minus = __dsub_rn(x[i], shift) < 0.0;
        if (against && i == flipped) minus = !minus;
        best.entry[i] = (minus ? -best.entry[i] : best.entry[i]) + shift;
    }
}

extern "C" __global__ void lattice(const float *target, long long target_stride,
                                   const float *scale, const long long *halves,
                                   unsigned char *digit, long long rows,
                                   long long columns, long long patterns)
{
    const long long runs = columns / WIDTH;
    const long long job = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (job >= rows * runs) return;
    const long long row = job / runs, start = job % runs * WIDTH;
    const float inverse = __fdiv_rn(1.0f, scale[row]);
    double x[WIDTH];
    for (int i = 0; i < WIDTH; ++i)
        x[i] = __fmul_rn(target[row * target_stride + start + i], inverse);
    Vector best;
    best.distance = 1e300;
    for (int i = 0; i < WIDTH; ++i) best.entry[i] = 0.25;  // of NaN
    try_shift(x, 0.25, halves, patterns, best);
    try_shift(x, -0.25, halves, patterns, best);
    for (int i = 0; i < WIDTH; ++i)
        digit[row * columns + start + i] = (unsigned char)(2.0 * best.entry[i] + 5.5);
}
