// What stands behind a product.
#pragma once
#include "formats.cuh"

constexpr float UNIT = 16777216.0f;  // sums of squares are counts of 1 / UNIT, as backends/fused/products.py has them

// What becomes of rows r and r + 8 of a tile, r = 0..7; `row` is which those are in a weight as it is. `Held` is what
// that needs besides the sums: it is loaded when the tile begins.
struct InOrder {
    static __device__ __forceinline__ int row(const Behind&, int tile, int r, bool second) {
        return tile * ROWS + r + 8 * second;
    }
};

struct NeedsNothing {
    struct Held {};
    static __device__ __forceinline__ Held hold(const Behind&, int, int, int) { return {}; }
};

struct Store : InOrder, NeedsNothing {
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = __float2bfloat16(a);
        out[r + 8] = __float2bfloat16(b);
    }
};

struct Residual : InOrder {
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

struct Logits : InOrder, NeedsNothing {
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<float*>(behind.out) + static_cast<size_t>(stream) * behind.rows + tile * ROWS;
        out[r] = a;
        out[r + 8] = b;
    }
};

// Gate in rows 0..7, up in rows 8..15.
struct Swiglu : NeedsNothing {
    static __device__ __forceinline__ int row(const Behind& behind, int tile, int r, bool second) {
        return tile * 8 + r + second * (behind.rows / 2);
    }
    static __device__ __forceinline__ void put(const Behind& behind, const Held&, int tile, int r, int stream, float a,
                                               float b) {
        auto* out = static_cast<__nv_bfloat16*>(behind.out) + static_cast<size_t>(stream) * (behind.rows / 2);
        out[tile * 8 + r] = __float2bfloat16(a / (1 + __expf(-a)) * b);
    }
};

// The members of rotary pairs, half a head apart; k and v go to the cache's row for this token.
struct Rotary {
    static __device__ __forceinline__ int row(const Behind& behind, int tile, int r, bool second) {
        const int half = behind.head_dim / 2;
        return tile / (half / 8) * behind.head_dim + tile % (half / 8) * 8 + r + second * half;
    }
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
