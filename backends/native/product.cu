// One to eight rows of activations times a weight, on tensor cores, with what stands before and behind the product
// fused around it.
//
// A block has W warps and serves tiles of 16 output features, one after the other; its warps share out a tile's groups
// of input features, and each has the activations of its own. F is how the weight lies in memory, E what becomes of it.
#include "endings.cuh"

namespace {

// A warp's own groups of the activations into shared memory, and the sum of each where they are needed: `totals` is
// [8 streams][groups], 0 where no stream is. What is to be loaded is under way before the first of it is stored.
template <int W, class F>
__device__ __forceinline__ void stage(__nv_bfloat16* x, float* totals, const Before& before, int warp, int lane) {
    constexpr int BATCH = 6, LANES = F::GROUP / 8, AT_ONCE = 32 / LANES;
    const int columns = before.columns, groups = columns / F::GROUP, place = lane % LANES * 8, which = lane / LANES;
    for (int stream = 0; stream < before.streams; ++stream) {
        for (int begin = warp; begin < groups; begin += AT_ONCE * BATCH * W) {
            uint4 eight[BATCH];
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                const int group = begin + (AT_ONCE * d + which) * W;
                eight[d] = make_uint4(0, 0, 0, 0);
                if (group < groups)
                    eight[d] = *reinterpret_cast<const uint4*>(before.x + stream * columns + group * F::GROUP + place);
            }
#pragma unroll
            for (int d = 0; d < BATCH; ++d) {
                const int group = begin + (AT_ONCE * d + which) * W;
                if (group < groups)
                    *reinterpret_cast<uint4*>(x + stream * columns + group * F::GROUP + place) = eight[d];
                if constexpr (F::TOTALS) {
                    const auto* two = reinterpret_cast<const __nv_bfloat162*>(&eight[d]);
                    float total = 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 pair = __bfloat1622float2(two[i]);
                        total += pair.x + pair.y;
                    }
#pragma unroll
                    for (int apart = LANES / 2; apart; apart /= 2) total += __shfl_xor_sync(~0u, total, apart);
                    if (group < groups && place == 0) totals[stream * groups + group] = total;
                }
            }
        }
    }
    if constexpr (F::TOTALS)
        for (int group = warp + lane * W; group < groups; group += 32 * W)
            for (int stream = before.streams; stream < STREAMS; ++stream) totals[stream * groups + group] = 0;
    __syncwarp();
}

constexpr int RESIDENT = 28;  // warps that a processor's registers have room for

// Activations as a lane finds them in shared memory: 64 zeros of them where no stream is.
constexpr int ZEROS = 64;

template <int W, class F, class E>
__device__ __forceinline__ void run(const Before& before, const Weight& weight, const Behind& behind, int ahead) {
    static_assert(8 * STREAMS <= 32 * W, "where sums meet a thread has one stream");
    extern __shared__ __align__(16) unsigned char shared[];
    const int columns = before.columns, groups = columns / F::GROUP, tiles = behind.rows / ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = threadIdx.x % 8, stream = threadIdx.x / 8;
    const bool ends = stream < before.streams;  // has a part of what becomes of the sums
    auto* x = reinterpret_cast<__nv_bfloat16*>(shared);
    auto* nothing = x + before.streams * columns;  // a lane's zeros where no stream is
    auto* totals = reinterpret_cast<float*>(nothing + ZEROS);
    // [2][W][16][8]: one tile's sums are read while the next one's come.
    auto* found = totals + (F::TOTALS ? STREAMS * groups : 0);

    asm volatile("griddepcontrol.launch_dependents;");
    auto from = F::template from<E>(weight, behind, columns, blockIdx.x, lane);
    typename F::Held codes[F::DEPTH];
    const auto fetch = [&](int group, typename F::Held& into) {
        if (group < groups) into = F::load(from, group);
    };
#pragma unroll
    for (int d = 0; d < F::DEPTH; ++d) fetch(warp + d * W, codes[d]);
    if (const int tile = blockIdx.x + threadIdx.x * gridDim.x; ahead && threadIdx.x <= ahead && tile < tiles)
        F::template ahead<E>(weight, behind, columns, tile, threadIdx.x ? 0 : F::DEPTH * W);
    if (lane < ZEROS / 8) reinterpret_cast<uint4*>(nothing)[lane] = make_uint4(0, 0, 0, 0);  // every warp for itself
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const float square = ends && before.squares ? static_cast<float>(before.squares[stream]) : 0;
    stage<W, F>(x, totals, before, warp, lane);
    const float scale = before.squares ? rsqrtf(square / (UNIT * columns) + before.eps) : 1;
    const bool here = lane / 4 < before.streams;
    const auto* own = reinterpret_cast<const uint4*>(here ? x + lane / 4 * columns + F::place(lane) : nothing);
    const int apart = here ? F::GROUP / 8 : 0;
    const float* sum = totals + 2 * (lane % 4) * groups;

    for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= W * ROWS * STREAMS) {
        typename E::Held held{};
        float bias_a = 0, bias_b = 0;
        if (ends) {
            held = E::hold(behind, tile, r, stream);
            if (weight.bias) {
                bias_a = __bfloat162float(weight.bias[F::template row<E>(behind, tile, r, false)]);
                bias_b = __bfloat162float(weight.bias[F::template row<E>(behind, tile, r, true)]);
            }
        }
        float sums[4] = {0, 0, 0, 0};
        for (int begin = warp; begin < groups; begin += F::DEPTH * W) {
#pragma unroll
            for (int d = 0; d < F::DEPTH; ++d) {
                const int group = begin + d * W;
                if (group < groups) F::add(sums, codes[d], own + group * apart, sum + group, groups);
                fetch(group + F::DEPTH * W, codes[d]);
            }
        }
        if (tile + gridDim.x < tiles) {  // the next one's are under way while sums meet
            from = F::template from<E>(weight, behind, columns, tile + gridDim.x, lane);
#pragma unroll
            for (int d = 0; d < F::DEPTH; ++d) fetch(warp + d * W, codes[d]);
        }
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

// Their names are what a profiler sees.
template <int W, class E>
__global__ void __launch_bounds__(32 * W, RESIDENT / W)
    int4_product(const Before before, const Weight weight, const Behind behind, int ahead) {
    run<W, Int4, E>(before, weight, behind, ahead);
}

template <int W, class E>
__global__ void __launch_bounds__(32 * W, RESIDENT / W)
    bf16_product(const Before before, const Weight weight, const Behind behind, int ahead) {
    run<W, Bf16, E>(before, weight, behind, ahead);
}

template <int W, class E>
cudaError_t launch(const Before& before, const Weight& weight, const Behind& behind, int blocks, int ahead,
                   cudaStream_t stream) {
    const int totals = weight.scales ? STREAMS * (before.columns / Int4::GROUP) : 0;
    const size_t shared = sizeof(__nv_bfloat16) * (before.streams * before.columns + ZEROS) +
                          sizeof(float) * (totals + 2 * W * ROWS * STREAMS);
    auto* kernel = weight.scales ? int4_product<W, E> : bf16_product<W, E>;
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

cudaError_t product_launch(const Before& before, const Weight& weight, const Behind& behind, int warps, int blocks,
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
