// Dense little-endian bit streams: code i of a row takes its bits i b .. i b + b - 1,
// lowest first; a row is padded with zero bits to a whole word of 32.
//
// A thread takes a run of 32 codes, which is BITS words; codes go by 16 where rows of
// them begin at multiples of 16 bytes. Layout: code [rows, codes],
// word [rows, words], words = ceil(codes BITS / 32), runs = ceil(codes / 32).
// -DBITS=2..8. Block: any number of threads, one for each of rows x runs.
// Alone: nvcc -DBITS=3 -cubin pack.cu

static_assert(BITS >= 1 && BITS <= 8, "a code is one byte");

constexpr int WORD = 32;
constexpr int EACH = 4;         // codes of a word of four bytes
constexpr int RUN = WORD / EACH;

struct alignas(16) Sixteen { unsigned four[4]; };

__device__ inline long long own_index()
{
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}

// Whether rows of codes can be read and written by 16 bytes.
__device__ inline bool by_sixteen(const unsigned char *code, long long codes)
{
    return (unsigned long long)code % 16 == 0 && codes % 16 == 0;
}

extern "C" __global__ void pack(const unsigned char *code, unsigned *word,
                                long long rows, long long codes, long long words,
                                long long runs)
{
    const long long row = own_index() / runs, run = own_index() % runs;
    if (row >= rows) return;
    const unsigned char *own = code + row * codes + run * WORD;
    const long long left = codes - run * WORD;
    unsigned four[RUN] = {};
    if (by_sixteen(code, codes)) {
#pragma unroll
        for (int part = 0; part < 2; ++part)
            if (part * 16 < left) {
                const Sixteen given = ((const Sixteen *)own)[part];
#pragma unroll
                for (int at = 0; at < 4; ++at) four[4 * part + at] = given.four[at];
            }
    } else {
#pragma unroll
        for (int i = 0; i < WORD; ++i)
            if (i < left) four[i / EACH] |= (unsigned)own[i] << (8 * (i % EACH));
    }
    unsigned made[BITS + 1] = {};
#pragma unroll
    for (int i = 0; i < WORD; ++i) {
        const unsigned value = four[i / EACH] >> (8 * (i % EACH)) & 0xffu;
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
    unsigned four[RUN] = {};
#pragma unroll
    for (int i = 0; i < WORD; ++i) {
        const int at = i * BITS / WORD, shift = i * BITS % WORD;
        unsigned value = given[at] >> shift;
        if (shift + BITS > WORD) value |= given[at + 1] << (WORD - shift);
        four[i / EACH] |= (value & ((1u << BITS) - 1)) << (8 * (i % EACH));
    }
    unsigned char *own = code + row * codes + run * WORD;
    const long long left = codes - run * WORD;
    if (by_sixteen(code, codes)) {
#pragma unroll
        for (int part = 0; part < 2; ++part)
            if (part * 16 < left) {
                Sixteen made;
#pragma unroll
                for (int at = 0; at < 4; ++at) made.four[at] = four[4 * part + at];
                ((Sixteen *)own)[part] = made;
            }
    } else {
#pragma unroll
        for (int i = 0; i < WORD; ++i)
            if (i < left) own[i] = four[i / EACH] >> (8 * (i % EACH)) & 0xffu;
    }
}
