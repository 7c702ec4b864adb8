// Attention that each key receives, without the map of all queries and keys:
//
//     sums[t] = sum over queries i of softmax_i(scaling q_i . k)[t],
//
// causal, with a window if it is not 0: query i sees the keys i - window < t <= i.
// Two kernels, each over tiles of 64 queries and 64 keys: `row_bounds` finds the largest
// score of each query and the sum of exp(score - largest); `column_sums` adds up
// exp(score - largest) / sum per key. Both compute a score by the same steps, so nothing
// of a row's mass is lost, however large its scores.
//
// Layout: query [sequences, heads, tokens, width], key [sequences, kv_heads, tokens,
// width]; largest, total and sums [sequences, heads, tokens]; all fp32 and contiguous.
// The sum over the heads is the caller's, in a fixed order.
// Grid: (ceil(tokens / 64), heads, sequences). Block: 256 threads.
// Alone: nvcc -cubin column_sums.cu

constexpr int TILE = 64;   // queries or keys of a tile
constexpr int DEPTH = 16;  // of the head width at a time
constexpr int SIDE = 16;   // threads along each side of a tile
constexpr int EACH = TILE / SIDE;
constexpr int THREADS = SIDE * SIDE;

struct Tile {
    float query[DEPTH][TILE + 1];
    float key[DEPTH][TILE + 1];
};

// Scores of this thread's 4 x 4 places: queries first_query + EACH * y + 0 .. 3, keys
// likewise by x. Reading is guarded; places outside get values that nobody uses.
__device__ inline void score_tile(const float *query, const float *key, Tile &tile,
                                  long long first_query, long long first_key,
                                  long long tokens, long long width, float scaling,
                                  float (&score)[EACH][EACH])
{
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    for (int i = 0; i < EACH; ++i)
        for (int j = 0; j < EACH; ++j) score[i][j] = 0.0f;
    for (long long start = 0; start < width; start += DEPTH) {
        for (int at = threadIdx.x; at < TILE * DEPTH; at += THREADS) {
            const int deep = at % DEPTH, place = at / DEPTH;
            const bool inside = start + deep < width;
            const long long i = first_query + place, j = first_key + place;
            tile.query[deep][place] =
                inside && i < tokens ? __fmul_rn(query[i * width + start + deep], scaling) : 0.0f;
            tile.key[deep][place] = inside && j < tokens ? key[j * width + start + deep] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int deep = 0; deep < DEPTH; ++deep)
            for (int i = 0; i < EACH; ++i)
                for (int j = 0; j < EACH; ++j)
                    score[i][j] = fmaf(tile.query[deep][y * EACH + i],
                                       tile.key[deep][x * EACH + j], score[i][j]);
        __syncthreads();
    }
}

__device__ inline float below_all() { return -__uint_as_float(0x7f800000u); }

__device__ inline bool sees(long long query, long long key, long long tokens, long long window)
{
    return query < tokens && key <= query && (window == 0 || query - key < window);
}

extern "C" __global__ void __launch_bounds__(THREADS)
row_bounds(const float *query, const float *key, float *largest, float *total,
           long long heads, long long kv_heads, long long tokens, long long width,
           float scaling, long long window)
{
    __shared__ Tile tile;
    __shared__ float best_of[TILE][SIDE + 1], sum_of[TILE][SIDE + 1];
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const long long head = blockIdx.y, sequence = blockIdx.z;
    const long long own = sequence * heads + head;
    const long long shared = sequence * kv_heads + head / (heads / kv_heads);
    query += own * tokens * width;
    key += shared * tokens * width;
    const long long first_query = (long long)blockIdx.x * TILE;
    long long from = window == 0 ? 0 : first_query - window + 1;
    from = from < 0 ? 0 : from / TILE * TILE;

    float best[EACH], sum[EACH], score[EACH][EACH];
    for (int i = 0; i < EACH; ++i) {
        best[i] = below_all();
        sum[i] = 0.0f;
    }
    for (long long first_key = from; first_key <= first_query; first_key += TILE) {
        score_tile(query, key, tile, first_query, first_key, tokens, width, scaling, score);
        for (int i = 0; i < EACH; ++i) {
            const long long at = first_query + y * EACH + i;
            for (int j = 0; j < EACH; ++j) {
                if (!sees(at, first_key + x * EACH + j, tokens, window)) continue;
                if (score[i][j] > best[i]) {
                    sum[i] = sum[i] * expf(best[i] - score[i][j]) + 1.0f;
                    best[i] = score[i][j];
                } else {
                    sum[i] += expf(score[i][j] - best[i]);
                }
            }
        }
    }
    for (int i = 0; i < EACH; ++i) {
        best_of[y * EACH + i][x] = best[i];
        sum_of[y * EACH + i][x] = sum[i];
    }
    __syncthreads();
    const long long at = first_query + threadIdx.x;
    if (threadIdx.x < TILE && at < tokens) {
        float most = below_all(), mass = 0.0f;
        for (int part = 0; part < SIDE; ++part) most = fmaxf(most, best_of[threadIdx.x][part]);
        for (int part = 0; part < SIDE; ++part)
            if (sum_of[threadIdx.x][part] > 0.0f)
                mass += sum_of[threadIdx.x][part] * expf(best_of[threadIdx.x][part] - most);
        largest[own * tokens + at] = most;
        total[own * tokens + at] = mass;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
column_sums(const float *query, const float *key, const float *largest, const float *total,
            float *sums, long long heads, long long kv_heads, long long tokens,
            long long width, float scaling, long long window)
{
    __shared__ Tile tile;
    __shared__ float part_of[TILE][SIDE + 1];
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    const long long head = blockIdx.y, sequence = blockIdx.z;
    const long long own = sequence * heads + head;
    const long long shared = sequence * kv_heads + head / (heads / kv_heads);
    query += own * tokens * width;
    key += shared * tokens * width;
    largest += own * tokens;
    total += own * tokens;
    const long long first_key = (long long)blockIdx.x * TILE;
    long long to = window == 0 ? tokens : first_key + TILE + window;
    to = to < tokens ? to : tokens;

    float part[EACH] = {}, score[EACH][EACH];
    for (long long first_query = first_key; first_query < to; first_query += TILE) {
        score_tile(query, key, tile, first_query, first_key, tokens, width, scaling, score);
        for (int i = 0; i < EACH; ++i) {
            const long long at = first_query + y * EACH + i;
            if (at >= tokens) continue;
            const float most = largest[at], mass = total[at];
            for (int j = 0; j < EACH; ++j)
                if (sees(at, first_key + x * EACH + j, tokens, window))
                    part[j] += expf(score[i][j] - most) / mass;
        }
    }
    for (int j = 0; j < EACH; ++j) part_of[x * EACH + j][y] = part[j];
    __syncthreads();
    const long long at = first_key + threadIdx.x;
    if (threadIdx.x < TILE && at < tokens) {
        float sum = 0.0f;
        for (int row = 0; row < SIDE; ++row) sum += part_of[threadIdx.x][row];
        sums[own * tokens + at] = sum;
    }
}
