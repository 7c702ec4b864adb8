// Enough of CUDA C++ for g++ to run a kernel on the CPU: one block after the other, each
// CUDA thread a fiber that runs until it meets a barrier. Fibers take turns in one
// direction, then in the other, so that a missing barrier changes the result.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

struct Index { unsigned x, y, z; };

namespace host {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;

struct Barrier { int arrived = 0; long generation = 0; };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index thread;
    bool finished = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber *running;
inline Index block, block_size, grid_size;
inline Barrier whole_block;
inline std::vector<Barrier> warps;
inline std::vector<uint64_t> exchange;
struct Fragments { unsigned a[4], b[2]; };
inline std::vector<Fragments> fragments;
inline long steps;  // barriers passed: no step in a whole round is a deadlock
inline void (*body)();

inline void pause() { swapcontext(&running->context, &scheduler); }

inline void wait(Barrier &barrier, int expected)
{
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++steps;
        return;
    }
    const long before = barrier.generation;
    while (before == barrier.generation) pause();
}

inline void enter()
{
    body();
    running->finished = true;
    ++steps;
    pause();
}

template <class Value> Value from_lane(Value value, int lane)
{
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    const int thread = running->thread.x, warp = thread / WARP;
    std::memcpy(&exchange[thread], &value, sizeof(Value));
    wait(warps[warp], WARP);
    std::memcpy(&value, &exchange[warp * WARP + lane], sizeof(Value));
    wait(warps[warp], WARP);
    return value;
}

inline float bf16_half(unsigned pair, int half)
{
    const unsigned bits = (half ? pair >> 16 : pair & 0xffffu) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// mma.m16n8k16 of bf16, by the tables of the PTX ISA: row r, column k of A lies with lane
// 4 (r % 8) + k % 8 / 2 in register r / 8 + 2 (k / 8); row k, column n of B with lane
// 4 n + k % 8 / 2 in register k / 8; odd k in the upper half.
inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    const int thread = running->thread.x, warp = thread / WARP, lane = thread % WARP;
    fragments[thread] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    wait(warps[warp], WARP);
    const Fragments *of = &fragments[warp * WARP];
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned left = of[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned right = of[column * 4 + k % 8 / 2].b[k / 8];
            d[i] = std::fma(bf16_half(left, k % 2), bf16_half(right, k % 2), d[i]);
        }
    }
    wait(warps[warp], WARP);
}

inline void run_block(int threads)
{
    fibers = std::vector<Fiber>(threads);
    warps.assign((threads + WARP - 1) / WARP, Barrier());
    exchange.assign(threads, 0);
    fragments.assign(threads, Fragments());
    whole_block = Barrier();
    for (int at = 0; at < threads; ++at) {
        Fiber &fiber = fibers[at];
        fiber.stack = std::make_unique<char[]>(STACK_BYTES);
        fiber.thread = {unsigned(at), 0, 0};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    bool backward = false;
    for (int left = threads; left > 0; backward = !backward) {
        const long before = steps;
        left = 0;
        for (int turn = 0; turn < threads; ++turn) {
            running = &fibers[backward ? threads - 1 - turn : turn];
            if (!running->finished) swapcontext(&scheduler, &running->context);
            left += !running->finished;
        }
        if (left > 0 && steps == before) {
            std::fprintf(stderr, "threads wait at a barrier that others never reach\n");
            std::abort();
        }
    }
}

template <class... Values, size_t... At>
void call(void (*kernel)(Values...), void **values, std::index_sequence<At...>)
{
    static void (*chosen)(Values...);
    static void **given;
    chosen = kernel;
    given = values;
    body = [] { chosen(*static_cast<Values *>(given[At])...); };
}

template <class... Values>
void launch(void (*kernel)(Values...), const unsigned *grid, unsigned threads, void **values)
{
    call(kernel, values, std::index_sequence_for<Values...>());
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {threads, 1, 1};
    for (block.z = 0; block.z < grid[2]; ++block.z)
        for (block.y = 0; block.y < grid[1]; ++block.y)
            for (block.x = 0; block.x < grid[0]; ++block.x) run_block(threads);
}

}  // namespace host

#define threadIdx (host::running->thread)
#define blockIdx (host::block)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)
#define __syncthreads() host::wait(host::whole_block, int(host::block_size.x))
#define HOST_MMA host::multiply
#define __syncwarp() \
    host::wait(host::warps[threadIdx.x / host::WARP], host::WARP)
#define __shfl_sync(mask, value, lane) host::from_lane(value, lane)
#define __shfl_xor_sync(mask, value, apart) \
    host::from_lane(value, int(threadIdx.x % host::WARP) ^ (apart))

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(unsigned bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
