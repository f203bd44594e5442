// What becomes of rows r and r + 8 of a tile, r = 0..7. `Fixed` is what that needs and no kernel of the step writes before:
// it is loaded before the wait for the kernel ahead. `Found` is what another kernel wrote.
#pragma once
#include "weight.cuh"

constexpr float UNIT = 16777216.0f;  // sums of squares are counts of 1 / UNIT, as backends/fused/products.py has them

struct Plain {
    struct Fixed {};
    struct Found {};
    static __device__ __forceinline__ int row(const Behind&) { return 0; }
    static __device__ __forceinline__ Fixed fixed(const Weight&, const Behind&, int, int, int) { return {}; }
    static __device__ __forceinline__ Found found(const Behind&, int, int, int) { return {}; }
};

// With the biases of both rows.
struct Biased : Plain {
    struct Fixed {
        __nv_bfloat16 a, b;
    };
    static __device__ __forceinline__ Fixed fixed(const Weight& weight, const Behind&, int tile, int r, int) {
        if (!weight.bias) return {};
        return {weight.bias[tile * ROWS + r], weight.bias[tile * ROWS + r + 8]};
    }
};

struct Store : Biased {
    static __device__ __forceinline__ void put(const Behind& behind, const Fixed& bias, const Found&, int tile, int r,
                                               int stream, int, float a, float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = __float2bfloat16(a + __bfloat162float(bias.a));
        out[r + 8] = __float2bfloat16(b + __bfloat162float(bias.b));
    }
};

struct Residual : Plain {
    struct Fixed {
        __nv_bfloat16 a, b;  // gains
    };
    struct Found {
        float a, b;
    };
    static __device__ __forceinline__ Fixed fixed(const Weight&, const Behind& behind, int tile, int r, int) {
        return {behind.gain[tile * ROWS + r], behind.gain[tile * ROWS + r + 8]};
    }
    static __device__ __forceinline__ Found found(const Behind& behind, int tile, int r, int stream) {
        const auto* x = static_cast<const float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        return {x[r], x[r + 8]};
    }
    static __device__ __forceinline__ void put(const Behind& behind, const Fixed& gain, const Found& there, int tile,
                                               int r, int stream, int, float a, float b) {
        const size_t at = static_cast<size_t>(stream) * behind.rows + tile * ROWS + r;
        auto* out = static_cast<float*>(behind.out) + at;
        a += there.a, b += there.b;
        out[0] = a;
        out[8] = b;
        behind.scaled[at] = __float2bfloat16(a * __bfloat162float(gain.a));
        behind.scaled[at + 8] = __float2bfloat16(b * __bfloat162float(gain.b));
        float squares = a * a + b * b;  // of the eight lanes that have a stream's part of the tile
        const unsigned eight = 0xffu << threadIdx.x % 32 / 16 * 16;
#pragma unroll
        for (int apart = 4; apart; apart /= 2) squares += __shfl_xor_sync(eight, squares, apart);
        if (r == 0) atomicAdd(behind.squares + stream, static_cast<unsigned long long>(__float2ll_rn(squares * UNIT)));
    }
};

struct Logits : Plain {
    static __device__ __forceinline__ void put(const Behind& behind, const Fixed&, const Found&, int tile, int r,
                                               int stream, int, float a, float b) {
        auto* out = static_cast<float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = a;
        out[r + 8] = b;
    }
};

// Gate in rows 0..7, up in rows 8..15.
struct Swiglu : Plain {
    static __device__ __forceinline__ void put(const Behind& behind, const Fixed&, const Found&, int tile, int r,
                                               int stream, int, float a, float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * (behind.rows / 2);
        out[tile * 8 + r] = __float2bfloat16(__fdividef(a * b, 1 + __expf(-a)));
    }
};

// The members of rotary pairs, half a head apart; k and v go to the cache's row for this token, which is there before the
// step begins as its last kernel alone changes it.
struct Rotary : Plain {
    struct Fixed {
        __nv_bfloat16 a, b;  // biases
        float cos, sin;
    };
    static __device__ __forceinline__ int row(const Behind& behind) { return *behind.length; }
    static __device__ __forceinline__ Fixed fixed(const Weight& weight, const Behind& behind, int tile, int r, int row) {
        const auto bias = Biased::fixed(weight, behind, tile, r, row);
        const int half = behind.head_dim / 2, at = row * half + tile % (half / 8) * 8 + r;
        if (tile / (half / 8) >= behind.q_heads + behind.kv_heads) return {bias.a, bias.b, 1, 0};
        return {bias.a, bias.b, behind.cos[at], behind.sin[at]};
    }
    static __device__ __forceinline__ void put(const Behind& behind, const Fixed& fixed, const Found&, int tile, int r,
                                               int stream, int row, float a, float b) {
        const int half = behind.head_dim / 2, head = tile / (half / 8), place = tile % (half / 8) * 8 + r;
        __nv_bfloat16* out;
        if (head < behind.q_heads) {
            out = static_cast<__nv_bfloat16*>(behind.out) +
                  (static_cast<size_t>(stream) * behind.q_heads + head) * behind.head_dim;
        } else {
            const int kv = (head - behind.q_heads) % behind.kv_heads;
            const size_t at = (static_cast<size_t>(stream) * behind.kv_heads + kv) * behind.capacity + row;
            out = (head < behind.q_heads + behind.kv_heads ? behind.keys : behind.values) + at * behind.head_dim;
        }
        a += __bfloat162float(fixed.a), b += __bfloat162float(fixed.b);
        out[place] = __float2bfloat16(a * fixed.cos - b * fixed.sin);
        out[place + half] = __float2bfloat16(b * fixed.cos + a * fixed.sin);
    }
};
