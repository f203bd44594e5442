// One to four rows of activations times an int4 weight, on tensor cores, with what stands before and behind the product
// fused around it.
//
// A block has W warps and serves tiles of 16 output features, one after the other; its warps share out a tile's groups
// of 128 input features, and each has the activations of its own. E is what becomes of a tile.
//
// A processor has few tiles of most weights, so what counts is how soon the first is done once the kernel ahead is: what
// that kernel does not write is loaded before the wait, and between the wait and the first product stands one load of
// activations.
#include "endings.cuh"

namespace {

constexpr int LANES = GROUP / 8;  // that have eight input features each of a group

// The two digits of four numbers, that of number i in byte i.
struct Digits {
    unsigned upper, lower;
};

// `counts[i]` are floats with the number, and half a lower digit more, at the end of their mantissas.
__device__ __forceinline__ Digits digits(const float* counts) {
    const unsigned a = __byte_perm(__float_as_uint(counts[0]), __float_as_uint(counts[1]), 0x5140);
    const unsigned b = __byte_perm(__float_as_uint(counts[2]), __float_as_uint(counts[3]), 0x5140);
    return {__byte_perm(a, b, 0x7632), __byte_perm(a, b, 0x5410) ^ 0x80808080u};
}

// A warp's own groups of the activations into shared memory as whole numbers of two digits, 256 * upper + lower, both
// signed bytes; `units` is [groups][STREAMS], what a number counts over UPPER_IS: the group's largest makes MOST of them.
// Of a group the eight lanes that share a stream find their sixteen bytes side by side, the upper digits first.
template <int W>
__device__ __forceinline__ void stage(uint2* x, float* units, const Before& before, int warp, int lane) {
    constexpr int AT_ONCE = 32 / LANES, BATCH = 4;
    constexpr float MOST = 127 * 256, LEAST = 1e-30f;
    constexpr float DOWN = 1 / 1048576.0f;  // by which a divisor is in the range of the fast division
    constexpr float BEHIND = 12582912.0f + 128;  // 1.5 * 2^23: a float's last bits count ones from there
    const int groups = before.columns / GROUP, which = lane / LANES * W, eight = lane % LANES;
    const int to = eight % 4 / 2 * 16 + eight / 4 * 2 + eight % 2;
    for (int stream = 0; stream < before.streams; ++stream) {
        const auto* from = reinterpret_cast<const uint4*>(before.x) + stream * groups * LANES;
        for (int begin = warp; begin < groups; begin += AT_ONCE * BATCH * W) {
            uint4 held[BATCH];  // what is to be loaded is under way before the first of it is stored
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                const int group = begin + AT_ONCE * d * W + which;
                held[d] = group < groups ? from[group * LANES + eight] : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                if (begin + AT_ONCE * d * W >= groups) break;
                const int group = begin + AT_ONCE * d * W + which;
                const auto* two = reinterpret_cast<const __nv_bfloat162*>(&held[d]);
                auto largest = __hmax2_nan(__hmax2_nan(__habs2(two[0]), __habs2(two[1])),
                                           __hmax2_nan(__habs2(two[2]), __habs2(two[3])));
#pragma unroll
                for (int apart = LANES / 2; apart; apart /= 2)
                    largest = __hmax2_nan(largest, __shfl_xor_sync(~0u, largest, apart));
                float most = __bfloat162float(__hmax_nan(largest.x, largest.y));
                if (most < LEAST) most = LEAST;  // what is no number stays none
                const float count = __fdividef(MOST * DOWN, most * DOWN);
                float counts[8];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair = __bfloat1622float2(two[i]);
                    counts[2 * i] = fmaf(pair.x, count, BEHIND);
                    counts[2 * i + 1] = fmaf(pair.y, count, BEHIND);
                }
                if (group < groups) {
                    const auto first = digits(counts), second = digits(counts + 4);
                    auto* own = x + (stream * groups + group) * 2 * LANES + to;
                    own[0] = make_uint2(first.upper, second.upper);
                    own[8] = make_uint2(first.lower, second.lower);
                    if (eight == 0) units[group * STREAMS + stream] = most < INFINITY ? most / (MOST * UPPER_IS) : NAN;
                }
            }
        }
    }
    __syncwarp();
}

// Blocks that a processor's registers are to have room for: with 72 or 80 registers a thread where that is 28 warps or
// somewhat fewer, and with 64, of which a few are spilled, where it is 32.
template <int W>
constexpr int RESIDENT = (W % 16 ? 28 : 32) / W;

constexpr int DEPTH = 2;  // groups that a warp has under way

template <int W, class E>
__device__ __forceinline__ void run(const Before& before, const Weight& weight, const Behind& behind) {
    static_assert(ROWS * STREAMS <= 32 * W, "where sums meet a thread has one stream");
    extern __shared__ __align__(16) unsigned char shared[];
    const int columns = before.columns, groups = columns / GROUP, tiles = behind.rows / ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int own_row = threadIdx.x % ROWS, r = own_row % 8, stream = threadIdx.x / ROWS;
    const bool sums_up = stream < before.streams;  // one row of a tile
    const bool ends = sums_up && own_row < 8;      // has a part of what becomes of rows r and r + 8
    // [2][W][16][4]: one tile's sums are read while the next one's come.
    auto* found = reinterpret_cast<float*>(shared);
    auto* later = reinterpret_cast<int*>(found + 2 * W * ROWS * STREAMS);  // [2], by turns too: the tile after the next
    auto* x = reinterpret_cast<uint4*>(later + 4);
    auto* nothing = x + before.streams * groups * LANES;  // a lane's activations where no stream is
    auto* units = reinterpret_cast<float*>(nothing + LANES);

    asm volatile("griddepcontrol.launch_dependents;");
    Part part(weight, groups, blockIdx.x, warp, lane);
    Held codes[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (warp + d * W < groups) codes[d] = part.load(d * W);
    const float share = 1 / (UNIT * columns);
    const int row = E::row(behind);
    typename E::Fixed fixed{};
    if (ends) fixed = E::fixed(weight, behind, blockIdx.x, r, row);
    if (lane < LANES) nothing[lane] = make_uint4(0, 0, 0, 0);  // every warp for itself
    for (int group = warp + lane * W; group < groups; group += 32 * W)
        for (int s = before.streams; s < STREAMS; ++s) units[group * STREAMS + s] = 0;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    typename E::Found there{};
    if (ends) there = E::found(behind, blockIdx.x, r, stream);
    const float square = ends && before.squares ? static_cast<float>(before.squares[stream]) : 0;
    stage<W>(reinterpret_cast<uint2*>(x), units, before, warp, lane);
    const int column = lane / 4;  // of the tile: a stream's upper digits, or its lower
    const bool here = column / DIGITS < before.streams;
    const int apart = here ? LANES : 0;
    const uint4* own = (here ? x + column / DIGITS * groups * LANES : nothing) + warp * apart + lane % 8;
    float scale = 0;

    int tile = blockIdx.x, next = tile + gridDim.x;
    for (int turn = 0; tile < tiles; turn ^= 1) {
        int ticket = 0;
        if (threadIdx.x == 0 && next < tiles && behind.tickets)
            ticket = static_cast<int>(atomicAdd(behind.tickets, 1ull));
        float sums[2] = {0, 0};
        const uint4* at = own;
        const auto* its = units + warp * STREAMS + lane % 4;
        for (int begin = warp; begin < groups; begin += DEPTH * W) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                if (begin + d * W < groups) add(sums, codes[d], at, its[d * W * STREAMS]);
                at += W * apart;
                if (begin + (DEPTH + d) * W < groups) codes[d] = part.load((DEPTH + d) * W);
            }
            its += DEPTH * W * STREAMS;
            part.on(DEPTH * W);
        }
        if (next < tiles) {  // its first groups are under way while sums meet
            part = Part(weight, groups, next, warp, lane);
#pragma unroll
            for (int d = 0; d < DEPTH; ++d)
                if (warp + d * W < groups) codes[d] = part.load(d * W);
        }
        auto* all = found + turn * W * ROWS * STREAMS;
        auto* mine = all + warp * ROWS * STREAMS + lane;
        mine[0] = sums[0];
        mine[8 * STREAMS] = sums[1];
        if (threadIdx.x == 0) later[turn] = behind.tickets ? 2 * gridDim.x + ticket : next + gridDim.x;
        __syncthreads();
        const int then = later[turn];
        float a = 0;
        if (sums_up) {
#pragma unroll
            for (int w = 0; w < W; ++w) a += all[(w * ROWS + own_row) * STREAMS + stream];
        }
        const float b = __shfl_xor_sync(~0u, a, 8);
        if (ends) {
            if (tile == blockIdx.x)
                scale = before.squares ? rsqrtf(square * share + before.eps) : 1;
            E::put(behind, fixed, there, tile, r, stream, row, a * scale, b * scale);
            if (next < tiles) {
                fixed = E::fixed(weight, behind, next, r, row);
                there = E::found(behind, next, r, stream);
            }
        }
        tile = next, next = then;
    }
}

// Its name is what a profiler sees.
template <int W, class E>
__global__ void __launch_bounds__(32 * W, RESIDENT<W>)
    int4_product(const Before before, const Weight weight, const Behind behind) {
    run<W, E>(before, weight, behind);
}

template <int W, class E>
cudaError_t launch(const Before& before, const Weight& weight, const Behind& behind, int blocks, cudaStream_t stream) {
    const size_t groups = before.columns / GROUP;
    const size_t shared = sizeof(uint4) * LANES * (before.streams * groups + 1) +
                          sizeof(float) * STREAMS * (groups + 2 * W * ROWS) + 4 * sizeof(int);
    auto* kernel = int4_product<W, E>;
    // What a block may have, not what this one has: a graph may be launched after another launch set it.
    int device = 0, most = 0;
    if (const auto failed = cudaGetDevice(&device)) return failed;
    if (const auto failed = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return failed;
    if (shared > static_cast<size_t>(most)) return cudaErrorInvalidValue;
    if (const auto failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most))
        return failed;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(min(blocks, behind.rows / ROWS));
    config.blockDim = dim3(32 * W);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, before, weight, behind);
}

template <class E>
cudaError_t with(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks,
                 cudaStream_t stream) {
    switch (warps) {
        case 4: return launch<4, E>(before, weight, behind, blocks, stream);
        case 7: return launch<7, E>(before, weight, behind, blocks, stream);
        case 8: return launch<8, E>(before, weight, behind, blocks, stream);
        case 14: return launch<14, E>(before, weight, behind, blocks, stream);
        case 16: return launch<16, E>(before, weight, behind, blocks, stream);
        case 28: return launch<28, E>(before, weight, behind, blocks, stream);
        case 32: return launch<32, E>(before, weight, behind, blocks, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t product_launch(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks,
                           cudaStream_t stream) {
    switch (behind.what) {
        case Fused::STORE: return with<Store>(before, weight, behind, warps, blocks, stream);
        case Fused::RESIDUAL: return with<Residual>(before, weight, behind, warps, blocks, stream);
        case Fused::SWIGLU: return with<Swiglu>(before, weight, behind, warps, blocks, stream);
        case Fused::LOGITS: return with<Logits>(before, weight, behind, warps, blocks, stream);
        case Fused::ROTARY: return with<Rotary>(before, weight, behind, warps, blocks, stream);
        default: return cudaErrorInvalidValue;
    }
}
