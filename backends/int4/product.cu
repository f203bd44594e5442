// One to eight rows of activations times an int4 weight, on tensor cores. The layout is backends/int4/layout.py's.
//
// A block has W warps and serves tiles of 16 output features, one after the other; its warps share out a tile's groups
// of 128 input features. Codes become bf16 by putting them behind the exponent of 128: 128 + code is exact, and what
// the 136 too much of each weight adds is taken off a group's sum by the sum of its activations (float32, exact to
// 2^-23 of the larger term). So a weight costs one instruction, not the three of a conversion.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int GROUP = 128, ROWS = 16, STREAMS = 8, DEPTH = 2;
constexpr unsigned CODES = 0x000f000fu, BEHIND_128 = 0x43004300u;
constexpr float TOO_MUCH = 136.0f;  // 128, and the 8 that a code of zero weight has

struct Codes {
    uint4 half[2];
    __half2 scales;  // of rows r and r + 8
};

__device__ __forceinline__ Codes load(const uint4* words, const __half2* scales, int tile, int groups, int group,
                                      int lane) {
    const size_t at = static_cast<size_t>(tile) * groups + group;
    Codes found;
    found.half[0] = __ldcs(words + (at * 2) * 32 + lane);
    found.half[1] = __ldcs(words + (at * 2 + 1) * 32 + lane);
    found.scales = scales[at * 8 + lane / 4];
    return found;
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
__device__ __forceinline__ void stage(__nv_bfloat16* x, float* totals, const __nv_bfloat16* given, int columns,
                                      int groups, int streams) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int one = warp; one < STREAMS * groups; one += warps) {
        const int stream = one / groups, at = stream * columns + (one % groups) * GROUP + lane * 4;
        float total = 0;
        if (stream < streams) {
            const uint2 four = *reinterpret_cast<const uint2*>(given + at);
            *reinterpret_cast<uint2*>(x + at) = four;
            const auto* two = reinterpret_cast<const __nv_bfloat162*>(&four);
            const float2 a = __bfloat1622float2(two[0]), b = __bfloat1622float2(two[1]);
            total = (a.x + a.y) + (b.x + b.y);
        }
#pragma unroll
        for (int apart = 16; apart; apart /= 2) total += __shfl_xor_sync(~0u, total, apart);
        if (lane == 0) totals[one] = total;
    }
}

template <int W>
__global__ void __launch_bounds__(32 * W)
    int4_product(const __nv_bfloat16* __restrict__ given, const uint4* __restrict__ words,
                 const __half2* __restrict__ scales, const __nv_bfloat16* __restrict__ bias,
                 __nv_bfloat16* __restrict__ out, int rows, int columns, int streams) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int groups = columns / GROUP, tiles = rows / ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto* x = reinterpret_cast<__nv_bfloat16*>(shared);
    auto* totals = reinterpret_cast<float*>(x + streams * columns);
    auto* found = totals + STREAMS * groups;  // [W][16][8]

    asm volatile("griddepcontrol.launch_dependents;");
    Codes codes[DEPTH];
    const auto fetch = [&](int tile, int group, Codes& into) {
        if (tile < tiles && group < groups) into = load(words, scales, tile, groups, group, lane);
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(blockIdx.x, warp + d * W, codes[d]);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    stage(x, totals, given, columns, groups, streams);
    __syncthreads();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sums[4] = {0, 0, 0, 0};
        for (int begin = warp; begin < groups; begin += DEPTH * W) {
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int group = begin + d * W;
                if (group < groups) add(sums, codes[d], x, totals, columns, groups, group, streams, lane);
                fetch(tile, group + DEPTH * W, codes[d]);
            }
        }
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) fetch(tile + gridDim.x, warp + d * W, codes[d]);  // under way while sums meet
        *reinterpret_cast<float2*>(found + (warp * ROWS + lane / 4) * STREAMS + lane % 4 * 2) =
            make_float2(sums[0], sums[1]);
        *reinterpret_cast<float2*>(found + (warp * ROWS + lane / 4 + 8) * STREAMS + lane % 4 * 2) =
            make_float2(sums[2], sums[3]);
        __syncthreads();
        for (int one = threadIdx.x; one < ROWS * streams; one += 32 * W) {
            const int row = one % ROWS, stream = one / ROWS, at = tile * ROWS + row;
            float sum = bias ? __bfloat162float(bias[at]) : 0;
#pragma unroll
            for (int w = 0; w < W; ++w) sum += found[(w * ROWS + row) * STREAMS + stream];
            out[static_cast<size_t>(stream) * rows + at] = __float2bfloat16(sum);
        }
        __syncthreads();
    }
}

template <int W>
cudaError_t launch(const void* x, const void* words, const void* scales, const void* bias, void* out, int rows,
                   int columns, int streams, int blocks, cudaStream_t stream) {
    const size_t shared = sizeof(__nv_bfloat16) * streams * columns +
                          sizeof(float) * (STREAMS * (columns / GROUP) + W * ROWS * STREAMS);
    auto* kernel = int4_product<W>;
    if (auto failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)))
        return failed;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(min(blocks, rows / ROWS));
    config.blockDim = dim3(32 * W);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<const __nv_bfloat16*>(x),
                              static_cast<const uint4*>(words), static_cast<const __half2*>(scales),
                              static_cast<const __nv_bfloat16*>(bias), static_cast<__nv_bfloat16*>(out), rows, columns,
                              streams);
}

}  // namespace

cudaError_t int4_launch(const void* x, const void* words, const void* scales, const void* bias, void* out, int rows,
                        int columns, int streams, int warps, int blocks, cudaStream_t stream) {
    switch (warps) {
        case 4: return launch<4>(x, words, scales, bias, out, rows, columns, streams, blocks, stream);
        case 7: return launch<7>(x, words, scales, bias, out, rows, columns, streams, blocks, stream);
        case 8: return launch<8>(x, words, scales, bias, out, rows, columns, streams, blocks, stream);
        case 14: return launch<14>(x, words, scales, bias, out, rows, columns, streams, blocks, stream);
        default: return cudaErrorInvalidValue;
    }
}
