// Dense little-endian bit streams: code i of a row takes its bits i b .. i b + b - 1,
// lowest first; a row is padded with zero bits to a whole word of 32.
//
// A thread takes a run of 32 codes, which is BITS words. Layout: code [rows, codes],
// word [rows, words], words = ceil(codes BITS / 32), runs = ceil(codes / 32).
// -DBITS=2..8. Block: any number of threads, one for each of rows x runs.
// Alone: nvcc -DBITS=3 -cubin pack.cu

static_assert(BITS >= 1 && BITS <= 8, "a code is one byte");

constexpr int WORD = 32;

__device__ inline long long own_index()
{
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}

extern "C" __global__ void pack(const unsigned char *code, unsigned *word,
                                long long rows, long long codes, long long words,
                                long long runs)
{
    const long long row = own_index() / runs, run = own_index() % runs;
    if (row >= rows) return;
    unsigned made[BITS + 1] = {};
#pragma unroll
    for (int i = 0; i < WORD; ++i) {
        const long long column = run * WORD + i;
        const unsigned value = column < codes ? code[row * codes + column] : 0;
        const int at = i * BITS / WORD, shift = i * BITS % WORD;
        made[at] |= value << shift;
        if (shift + BITS > WORD) made[at + 1] |= value >> (WORD - shift);
    }
#pragma unroll
    for (int at = 0; at < BITS; ++at)
        if (run * BITS + at < words) word[row * words + run * BITS + at] = made[at];
}

extern "C" __global__ void unpack(const unsigned *word, unsigned char *code,
                                  long long rows, long long codes, long long words,
                                  long long runs)
{
    const long long row = own_index() / runs, run = own_index() % runs;
    if (row >= rows) return;
    unsigned given[BITS + 1] = {};
#pragma unroll
    for (int at = 0; at < BITS; ++at)
        if (run * BITS + at < words) given[at] = word[row * words + run * BITS + at];
#pragma unroll
    for (int i = 0; i < WORD; ++i) {
        const long long column = run * WORD + i;
        const int at = i * BITS / WORD, shift = i * BITS % WORD;
        unsigned value = given[at] >> shift;
        if (shift + BITS > WORD) value |= given[at + 1] << (WORD - shift);
        if (column < codes) code[row * codes + column] = value & ((1u << BITS) - 1);
    }
}
