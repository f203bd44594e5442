// One to eight rows of activations times an int4 weight, on tensor cores, with what stands before and behind the
// product fused around it. The layout is backends/int4/layout.py's.
//
// A block has W warps and serves tiles of 16 output features, one after the other; its warps share out a tile's groups
// of 128 input features. Codes become bf16 by putting them behind the exponent of 128: 128 + code is exact, and what
// the 136 too much of each weight adds is taken off a group's sum by the sum of its activations (float32, exact to
// 2^-23 of the larger term). So a weight costs one instruction, not the three of a conversion.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "product.h"

namespace {

constexpr int GROUP = 128, ROWS = 16, STREAMS = 8, DEPTH = 2, LANE = 32;  // LANE: a lane's activations of a group
constexpr unsigned CODES = 0x000f000fu, BEHIND_128 = 0x43004300u;
constexpr float TOO_MUCH = 136.0f;  // 128, and the 8 that a code of zero weight has
constexpr float UNIT = 16777216.0f;  // sums of squares are counts of 1 / UNIT, as backends/fused/products.py has them

struct Codes {
    uint4 half[2];
    __half2 scales;  // of rows r and r + 8
};

__device__ __forceinline__ Codes load(const Weight& weight, int tile, int groups, int group, int lane) {
    const size_t at = static_cast<size_t>(tile) * groups + group;
    const uint4* words = weight.words + at * 64 + lane;
    return {{__ldcs(words), __ldcs(words + 32)}, weight.scales[at * 8 + lane / 4]};
}

// Have a tile's words come into L2, from a group on.
__device__ __forceinline__ void ask(const Weight& weight, int tile, int tiles, int groups, int from) {
    if (tile >= tiles || from >= groups) return;
    const auto* words = weight.words + (static_cast<size_t>(tile) * groups + from) * 64;
    const unsigned bytes = (groups - from) * 64 * sizeof(uint4);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(words), "r"(bytes));
}

__device__ __forceinline__ unsigned pair(unsigned word) {
    unsigned made;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(made) : "r"(word), "r"(CODES), "r"(BEHIND_128));  // (a & b) | c
    return made;
}

__device__ __forceinline__ void multiply(float (&c)[4], unsigned word, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(pair(word)), "r"(pair(word >> 4)), "r"(pair(word >> 8)), "r"(pair(word >> 12)), "r"(b0), "r"(b1));
}

// Adds a group's product to the sums: `sums[i]` is row lane / 4 (+ 8 for i > 1) of stream 2 * (lane % 4) + i % 2.
// `x` are the lane's activations of the group, `totals` the group's sums of its two streams, `groups` apart.
__device__ __forceinline__ void add(float (&sums)[4], const Codes& codes, const uint4* x, const float* totals,
                                    int groups) {
    const float one = -TOO_MUCH * totals[0], two = -TOO_MUCH * totals[groups];
    float c[4] = {one, two, one, two};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 a = x[2 * half], b = x[2 * half + 1], words = codes.half[half];
        multiply(c, words.x, a.x, a.y);
        multiply(c, words.y, a.z, a.w);
        multiply(c, words.z, b.x, b.y);
        multiply(c, words.w, b.z, b.w);
    }
    const float2 scale = __half22float2(codes.scales);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += (i < 2 ? scale.x : scale.y) * c[i];
}

// A warp's own groups of the activations into shared memory, and the sum of each: `totals` is [8 streams][groups], 0
// where no stream is. Half a warp has a group; what is to be loaded is under way before the first of it is stored.
template <int W>
__device__ __forceinline__ void stage(__nv_bfloat16* x, float* totals, const Before& before, int warp, int lane) {
    constexpr int BATCH = 6;
    const int columns = before.columns, groups = columns / GROUP, place = lane % 16 * 8, half = lane / 16;
    for (int stream = 0; stream < before.streams; ++stream) {
        for (int begin = warp; begin < groups; begin += 2 * BATCH * W) {
            uint4 eight[BATCH];
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                const int group = begin + (2 * d + half) * W;
                eight[d] = make_uint4(0, 0, 0, 0);
                if (group < groups)
                    eight[d] = *reinterpret_cast<const uint4*>(before.x + stream * columns + group * GROUP + place);
            }
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                const int group = begin + (2 * d + half) * W;
                const auto* two = reinterpret_cast<const __nv_bfloat162*>(&eight[d]);
                float total = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 pair = __bfloat1622float2(two[i]);
                    total += pair.x + pair.y;
                }
#pragma unroll
                for (int apart = 8; apart; apart /= 2) total += __shfl_xor_sync(~0u, total, apart);
                if (group >= groups) continue;
                *reinterpret_cast<uint4*>(x + stream * columns + group * GROUP + place) = eight[d];
                if (place == 0) totals[stream * groups + group] = total;
            }
        }
    }
    for (int group = warp + lane * W; group < groups; group += 32 * W)
        for (int stream = before.streams; stream < STREAMS; ++stream) totals[stream * groups + group] = 0;
    __syncwarp();
}

// What becomes of rows r and r + 8 of a tile, r = 0..7. `Held` is what that needs besides the sums: it is loaded when
// the tile begins.
struct Store {
    struct Held {};
    static __device__ __forceinline__ Held hold(const Behind&, int, int, int) { return {}; }
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = __float2bfloat16(a);
        out[r + 8] = __float2bfloat16(b);
    }
};

struct Residual {
    struct Held {
        float a, b;
        __nv_bfloat16 gain_a, gain_b;
    };
    static __device__ __forceinline__ Held hold(const Behind& behind, int tile, int r, int stream) {
        const int row = tile * ROWS + r;
        const auto* x = static_cast<const float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + row;
        return {x[0], x[8], behind.gain[row], behind.gain[row + 8]};
    }
    static __device__ __forceinline__ void put(const Behind& behind, const Held& held, int tile, int r, int stream,
                                               float a, float b) {
        const size_t at = static_cast<size_t>(stream) * behind.rows + tile * ROWS + r;
        auto* out = static_cast<float*>(behind.out) + at;
        a += held.a, b += held.b;
        out[0] = a;
        out[8] = b;
        behind.scaled[at] = __float2bfloat16(a * __bfloat162float(held.gain_a));
        behind.scaled[at + 8] = __float2bfloat16(b * __bfloat162float(held.gain_b));
        float squares = a * a + b * b;  // of the eight lanes that have a stream's part of the tile
        const unsigned eight = 0xffu << threadIdx.x % 32 / 8 * 8;
#pragma unroll
        for (int apart = 4; apart; apart /= 2) squares += __shfl_xor_sync(eight, squares, apart);
        if (r == 0) atomicAdd(behind.squares + stream, static_cast<unsigned long long>(__float2ll_rn(squares * UNIT)));
    }
};

struct Logits {
    struct Held {};
    static __device__ __forceinline__ Held hold(const Behind&, int, int, int) { return {}; }
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = a;
        out[r + 8] = b;
    }
};

// Gate in rows 0..7, up in rows 8..15.
struct Swiglu {
    struct Held {};
    static __device__ __forceinline__ Held hold(const Behind&, int, int, int) { return {}; }
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * (behind.rows / 2);
        out[tile * 8 + r] = __float2bfloat16(a / (1 + __expf(-a)) * b);
    }
};

// The members of rotary pairs, half a head apart; k and v go to the cache's row for this token.
struct Rotary {
    struct Held {
        int row;
        float cos, sin;
    };
    static __device__ __forceinline__ Held hold(const Behind& behind, int tile, int r, int) {
        const int half = behind.head_dim / 2, place = tile % (half / 8) * 8 + r, row = *behind.length;
        if (tile / (half / 8) >= behind.q_heads + behind.kv_heads) return {row, 1, 0};
        return {row, behind.cos[row * half + place], behind.sin[row * half + place]};
    }
    static __device__ __forceinline__ void put(const Behind& behind, const Held& held, int tile, int r, int stream,
                                               float a, float b) {
        const int half = behind.head_dim / 2, head = tile / (half / 8), place = tile % (half / 8) * 8 + r;
        __nv_bfloat16* out;
        if (head < behind.q_heads) {
            out = static_cast<__nv_bfloat16*>(behind.out) +
                  (static_cast<size_t>(stream) * behind.q_heads + head) * behind.head_dim;
        } else {
            const int kv = (head - behind.q_heads) % behind.kv_heads;
            const size_t at = (static_cast<size_t>(stream) * behind.kv_heads + kv) * behind.capacity + held.row;
            out = (head < behind.q_heads + behind.kv_heads ? behind.keys : behind.values) + at * behind.head_dim;
        }
        out[place] = __float2bfloat16(a * held.cos - b * held.sin);
        out[place + half] = __float2bfloat16(b * held.cos + a * held.sin);
    }
};

template <int W, class E>
__global__ void __launch_bounds__(32 * W) int4_product(const Before before, const Weight weight, const Behind behind,
                                                       int ahead) {
    static_assert(8 * STREAMS <= 32 * W, "where sums meet a thread has one stream");
    extern __shared__ __align__(16) unsigned char shared[];
    const int columns = before.columns, groups = columns / GROUP, tiles = behind.rows / ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = threadIdx.x % 8, stream = threadIdx.x / 8;
    const bool ends = stream < before.streams;  // has a part of what becomes of the sums
    auto* x = reinterpret_cast<__nv_bfloat16*>(shared);
    auto* nothing = x + before.streams * columns;  // a lane's zeros where no stream is
    auto* totals = reinterpret_cast<float*>(nothing + LANE);
    auto* found = totals + STREAMS * groups;  // [2][W][16][8]: one tile's sums are read while the next one's come

    asm volatile("griddepcontrol.launch_dependents;");
    Codes codes[DEPTH];
    const auto fetch = [&](int tile, int group, Codes& into) {
        if (tile < tiles && group < groups) into = load(weight, tile, groups, group, lane);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(blockIdx.x, warp + d * W, codes[d]);
    if (ahead && threadIdx.x <= ahead)
        ask(weight, blockIdx.x + threadIdx.x * gridDim.x, tiles, groups, threadIdx.x ? 0 : DEPTH * W);
    if (lane < LANE / 8) reinterpret_cast<uint4*>(nothing)[lane] = make_uint4(0, 0, 0, 0);  // every warp for itself
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const float square = ends && before.squares ? static_cast<float>(before.squares[stream]) : 0;
    stage<W>(x, totals, before, warp, lane);
    const float scale = before.squares ? rsqrtf(square / (UNIT * columns) + before.eps) : 1;
    const bool here = lane / 4 < before.streams;
    const auto* own = reinterpret_cast<const uint4*>(here ? x + lane / 4 * columns + lane % 4 * LANE : nothing);
    const int apart = here ? GROUP / 8 : 0;
    const float* sum = totals + 2 * (lane % 4) * groups;

    for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= W * ROWS * STREAMS) {
        typename E::Held held{};
        float bias_a = 0, bias_b = 0;
        if (ends) {
            held = E::hold(behind, tile, r, stream);
            if (weight.bias) {
                bias_a = __bfloat162float(weight.bias[tile * ROWS + r]);
                bias_b = __bfloat162float(weight.bias[tile * ROWS + r + 8]);
            }
        }
        float sums[4] = {0, 0, 0, 0};
        for (int begin = warp; begin < groups; begin += DEPTH * W) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int group = begin + d * W;
                if (group < groups) add(sums, codes[d], own + group * apart, sum + group, groups);
                fetch(tile, group + DEPTH * W, codes[d]);
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) fetch(tile + gridDim.x, warp + d * W, codes[d]);  // under way while sums meet
        auto* mine = found + turn + (warp * ROWS + lane / 4) * STREAMS + lane % 4 * 2;
        *reinterpret_cast<float2*>(mine) = make_float2(sums[0], sums[1]);
        *reinterpret_cast<float2*>(mine + 8 * STREAMS) = make_float2(sums[2], sums[3]);
        __syncthreads();
        if (ends) {
            float a = 0, b = 0;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                a += found[turn + (w * ROWS + r) * STREAMS + stream];
                b += found[turn + (w * ROWS + r + 8) * STREAMS + stream];
            }
            E::put(behind, held, tile, r, stream, a * scale + bias_a, b * scale + bias_b);
        }
    }
}

template <int W, class E>
cudaError_t launch(const Before& before, const Weight& weight, const Behind& behind, int blocks, int ahead,
                   cudaStream_t stream) {
    const size_t shared = sizeof(__nv_bfloat16) * (before.streams * before.columns + LANE) +
                          sizeof(float) * (STREAMS * (before.columns / GROUP) + 2 * W * ROWS * STREAMS);
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
    return cudaLaunchKernelEx(&config, kernel, before, weight, behind, ahead);
}

template <class E>
cudaError_t with(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks, int ahead,
                 cudaStream_t stream) {
    switch (warps) {
        case 4: return launch<4, E>(before, weight, behind, blocks, ahead, stream);
        case 7: return launch<7, E>(before, weight, behind, blocks, ahead, stream);
        case 8: return launch<8, E>(before, weight, behind, blocks, ahead, stream);
        case 14: return launch<14, E>(before, weight, behind, blocks, ahead, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t int4_launch(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks,
                        int ahead, cudaStream_t stream) {
    switch (behind.what) {
        case Fused::STORE: return with<Store>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::RESIDUAL: return with<Residual>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::SWIGLU: return with<Swiglu>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::LOGITS: return with<Logits>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::ROTARY: return with<Rotary>(before, weight, behind, warps, blocks, ahead, stream);
        default: return cudaErrorInvalidValue;
    }
}
