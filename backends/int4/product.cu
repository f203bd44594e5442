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

constexpr int GROUP = 128, ROWS = 16, STREAMS = 8, DEPTH = 2;
constexpr unsigned CODES = 0x000f000fu, BEHIND_128 = 0x43004300u;
constexpr float TOO_MUCH = 136.0f;  // 128, and the 8 that a code of zero weight has
constexpr float UNIT = 16777216.0f;  // sums of squares are counts of 1 / UNIT, as backends/fused/products.py has them

struct Codes {
    uint4 half[2];
    __half2 scales;  // of rows r and r + 8
};

__device__ __forceinline__ Codes load(const Weight& weight, int tile, int groups, int group, int lane) {
    const size_t at = static_cast<size_t>(tile) * groups + group;
    Codes found;
    found.half[0] = __ldcs(weight.words + (at * 2) * 32 + lane);
    found.half[1] = __ldcs(weight.words + (at * 2 + 1) * 32 + lane);
    found.scales = weight.scales[at * 8 + lane / 4];
    return found;
}

// Have a tile's words come into L2.
__device__ __forceinline__ void ask(const Weight& weight, int tile, int tiles, int groups) {
    if (tile >= tiles) return;
    const size_t bytes = sizeof(uint4) * 2 * 32 * groups;
    const auto* from = reinterpret_cast<const char*>(weight.words) + tile * bytes;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(static_cast<unsigned>(bytes)));
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
__device__ __forceinline__ void add(float (&sums)[4], const Codes& codes, const __nv_bfloat16* x, const float* totals,
                                    int columns, int groups, int group, int streams, int lane) {
    const int stream = lane / 4, block = lane % 4;
    float c[4] = {0, 0, 0, 0};
    const uint4* own = reinterpret_cast<const uint4*>(x + stream * columns + group * GROUP + block * 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (stream < streams) a = own[2 * half], b = own[2 * half + 1];
        const uint4 words = codes.half[half];
        multiply(c, words.x, a.x, a.y);
        multiply(c, words.y, a.z, a.w);
        multiply(c, words.z, b.x, b.y);
        multiply(c, words.w, b.z, b.w);
    }
    const float2 scale = __half22float2(codes.scales);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float total = totals[(2 * block + i % 2) * groups + group];
        sums[i] += (i < 2 ? scale.x : scale.y) * (c[i] - TOO_MUCH * total);
    }
}

// Activations into shared memory, and the sum of each group's: `totals` is [8 streams][groups], 0 where no stream is.
// Half a warp has a group; what a warp is to load is under way before it stores the first of it.
template <int W>
__device__ __forceinline__ void stage(__nv_bfloat16* x, float* totals, const Before& before) {
    constexpr int BATCH = 6, APART = 2 * W;
    const int columns = before.columns, groups = columns / GROUP, all = before.streams * groups;
    const int first = threadIdx.x / 16, place = threadIdx.x % 16 * 8;
    for (int begin = first; begin - first < all; begin += BATCH * APART) {  // as often in every lane: they shuffle
        uint4 eight[BATCH];
#pragma unroll
        for (int d = 0; d < BATCH; ++d) {
            const int one = begin + d * APART;
            eight[d] = make_uint4(0, 0, 0, 0);
            if (one < all) eight[d] = *reinterpret_cast<const uint4*>(before.x + one * GROUP + place);
        }
#pragma unroll
        for (int d = 0; d < BATCH; ++d) {
            const int one = begin + d * APART;
            const auto* two = reinterpret_cast<const __nv_bfloat162*>(&eight[d]);
            float total = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 pair = __bfloat1622float2(two[i]);
                total += pair.x + pair.y;
            }
#pragma unroll
            for (int apart = 8; apart; apart /= 2) total += __shfl_xor_sync(~0u, total, apart);
            if (one >= all) continue;
            *reinterpret_cast<uint4*>(x + one * GROUP + place) = eight[d];
            if (place == 0) totals[one] = total;
        }
    }
    for (int one = all + threadIdx.x; one < STREAMS * groups; one += 32 * W) totals[one] = 0;
}

// What becomes of rows r and r + 8 of a tile, r = 0..7.
struct Store {
    static __device__ __forceinline__ void put(const Behind& behind, int tile, int r, int stream, float a, float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = __float2bfloat16(a);
        out[r + 8] = __float2bfloat16(b);
    }
};

struct Residual {
    static __device__ __forceinline__ void put(const Behind& behind, int tile, int r, int stream, float a, float b) {
        const int row = tile * ROWS + r;
        const size_t at = static_cast<size_t>(stream) * behind.rows + row;
        auto* out = static_cast<float*>(behind.out) + at;
        a = out[0] += a;
        b = out[8] += b;
        behind.scaled[at] = __float2bfloat16(a * __bfloat162float(behind.gain[row]));
        behind.scaled[at + 8] = __float2bfloat16(b * __bfloat162float(behind.gain[row + 8]));
        atomicAdd(behind.squares + stream, static_cast<unsigned long long>(__float2ll_rn((a * a + b * b) * UNIT)));
    }
};

struct Logits {
    static __device__ __forceinline__ void put(const Behind& behind, int tile, int r, int stream, float a, float b) {
        auto* out = static_cast<float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = a;
        out[r + 8] = b;
    }
};

// Gate in rows 0..7, up in rows 8..15.
struct Swiglu {
    static __device__ __forceinline__ void put(const Behind& behind, int tile, int r, int stream, float a, float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * (behind.rows / 2);
        out[tile * 8 + r] = __float2bfloat16(a / (1 + __expf(-a)) * b);
    }
};

// The members of rotary pairs, half a head apart; k and v go to the last valid row of the cache.
struct Rotary {
    static __device__ __forceinline__ void put(const Behind& behind, int tile, int r, int stream, float a, float b) {
        const int half = behind.head_dim / 2, head = tile / (half / 8), place = tile % (half / 8) * 8 + r;
        const int row = *behind.length, turned = behind.q_heads + behind.kv_heads;
        if (head < turned) {
            const float c = behind.cos[row * half + place], s = behind.sin[row * half + place], first = a;
            a = first * c - b * s;
            b = b * c + first * s;
        }
        __nv_bfloat16* out;
        if (head < behind.q_heads) {
            out = static_cast<__nv_bfloat16*>(behind.out) +
                  (static_cast<size_t>(stream) * behind.q_heads + head) * behind.head_dim;
        } else {
            const int kv = (head - behind.q_heads) % behind.kv_heads;
            const size_t at = (static_cast<size_t>(stream) * behind.kv_heads + kv) * behind.capacity + row;
            out = (head < turned ? behind.keys : behind.values) + at * behind.head_dim;
        }
        out[place] = __float2bfloat16(a);
        out[place + half] = __float2bfloat16(b);
    }
};

template <int W, class E>
__global__ void __launch_bounds__(32 * W) int4_product(const Before before, const Weight weight, const Behind behind,
                                                        int ahead) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int columns = before.columns, groups = columns / GROUP, tiles = behind.rows / ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto* x = reinterpret_cast<__nv_bfloat16*>(shared);
    auto* totals = reinterpret_cast<float*>(x + before.streams * columns);
    auto* found = totals + STREAMS * groups;  // [2][W][16][8]: one tile's sums are read while the next one's come

    asm volatile("griddepcontrol.launch_dependents;");
    Codes codes[DEPTH];
    const auto fetch = [&](int tile, int group, Codes& into) {
        if (tile < tiles && group < groups) into = load(weight, tile, groups, group, lane);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(blockIdx.x, warp + d * W, codes[d]);
    if (threadIdx.x < ahead) ask(weight, blockIdx.x + (1 + threadIdx.x) * gridDim.x, tiles, groups);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage<W>(x, totals, before);
    static_assert(8 * STREAMS <= 32 * W, "where sums meet a thread has one stream");
    float scale = 1;
    if (before.squares && threadIdx.x < 8 * before.streams)
        scale = rsqrtf(static_cast<float>(before.squares[threadIdx.x / 8]) / (UNIT * columns) + before.eps);
    __syncthreads();

    for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= W * ROWS * STREAMS) {
        float sums[4] = {0, 0, 0, 0};
        for (int begin = warp; begin < groups; begin += DEPTH * W) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int group = begin + d * W;
                if (group < groups) add(sums, codes[d], x, totals, columns, groups, group, before.streams, lane);
                fetch(tile, group + DEPTH * W, codes[d]);
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) fetch(tile + gridDim.x, warp + d * W, codes[d]);  // under way while sums meet
        auto* own = found + turn + (warp * ROWS + lane / 4) * STREAMS + lane % 4 * 2;
        *reinterpret_cast<float2*>(own) = make_float2(sums[0], sums[1]);
        *reinterpret_cast<float2*>(own + 8 * STREAMS) = make_float2(sums[2], sums[3]);
        __syncthreads();
        if (threadIdx.x < 8 * before.streams) {
            const int r = threadIdx.x % 8, stream = threadIdx.x / 8;
            float a = 0, b = 0;
#pragma unroll
            for (int w = 0; w < W; ++w) {
                a += found[turn + (w * ROWS + r) * STREAMS + stream];
                b += found[turn + (w * ROWS + r + 8) * STREAMS + stream];
            }
            a *= scale, b *= scale;
            if (weight.bias) {
                a += __bfloat162float(weight.bias[tile * ROWS + r]);
                b += __bfloat162float(weight.bias[tile * ROWS + r + 8]);
            }
            E::put(behind, tile, r, stream, a, b);
        }
    }
}

template <int W, class E>
cudaError_t launch(const Before& before, const Weight& weight, const Behind& behind, int blocks, int ahead,
                   cudaStream_t stream) {
    const size_t shared = sizeof(__nv_bfloat16) * before.streams * before.columns +
                          sizeof(float) * (STREAMS * (before.columns / GROUP) + 2 * W * ROWS * STREAMS);
    auto* kernel = int4_product<W, E>;
    if (const auto failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared)))
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

cudaError_t int4_launch(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks, int ahead,
                        cudaStream_t stream) {
    switch (behind.what) {
        case Fused::STORE: return with<Store>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::RESIDUAL: return with<Residual>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::SWIGLU: return with<Swiglu>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::LOGITS: return with<Logits>(before, weight, behind, warps, blocks, ahead, stream);
        case Fused::ROTARY: return with<Rotary>(before, weight, behind, warps, blocks, ahead, stream);
        default: return cudaErrorInvalidValue;
    }
}
