// Weights as a product's warps read them. A tile is 16 output features, rows r and r + 8 of it what `mma.m16n8k16`
// wants of a lane, r = lane / 4; which input features a lane has of a group is free as long as the activations follow.
#pragma once
#include "product.h"

constexpr int ROWS = 16, STREAMS = 8;

// c += a tile's product; a0 and a2 are of row r, a1 and a3 of row r + 8.
__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Has memory come into L2.
__device__ __forceinline__ void ask(const void* from, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

// The layout is backends/int4/layout.py's. Codes become bf16 by putting them behind the exponent of 128: 128 + code is
// exact, and what the 136 too much of each weight adds is taken off a group's sum by the sum of its activations
// (float32, exact to 2^-23 of the larger term). So a weight costs one instruction, not the three of a conversion.
struct Int4 {
    static constexpr int GROUP = 128, DEPTH = 2;
    static constexpr bool TOTALS = true;  // a group's sum of activations is needed
    static constexpr unsigned CODES = 0x000f000fu, BEHIND_128 = 0x43004300u;
    static constexpr float TOO_MUCH = 136.0f;  // 128, and the 8 that a code of zero weight has

    struct Held {
        uint4 half[2];
        __half2 scales;  // of rows r and r + 8
    };
    // Where a lane's part of a tile begins.
    struct From {
        const uint4* words;
        const __half2* scales;
    };

    // Which row of the bias r, or r + 8, is.
    template <class E>
    static __device__ __forceinline__ int row(const Behind&, int tile, int r, bool second) {
        return tile * ROWS + r + 8 * second;
    }

    template <class E>
    static __device__ __forceinline__ From from(const Weight& weight, const Behind&, int columns, int tile, int lane) {
        const size_t at = static_cast<size_t>(tile) * (columns / GROUP);
        return {static_cast<const uint4*>(weight.words) + at * 64 + lane, weight.scales + at * 8 + lane / 4};
    }

    static __device__ __forceinline__ Held load(const From& from, int group) {
        return {{__ldcs(from.words + group * 64), __ldcs(from.words + group * 64 + 32)}, from.scales[group * 8]};
    }

    // Has what is behind a tile's first groups come into L2.
    template <class E>
    static __device__ __forceinline__ void ahead(const Weight& weight, const Behind&, int columns, int tile, int skip) {
        const int groups = columns / GROUP;
        if (skip >= groups) return;
        const auto* words = static_cast<const uint4*>(weight.words) + (static_cast<size_t>(tile) * groups + skip) * 64;
        ask(words, (groups - skip) * 64 * sizeof(uint4));
    }

    // Of a group, the first of the lane's input features; it has 32 neighbours.
    static __device__ __forceinline__ int place(int lane) { return lane % 4 * 32; }

    static __device__ __forceinline__ unsigned pair(unsigned word) {
        unsigned made;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(made) : "r"(word), "r"(CODES), "r"(BEHIND_128));  // (a & b) | c
        return made;
    }

    static __device__ __forceinline__ void step(float (&c)[4], unsigned word, unsigned b0, unsigned b1) {
        multiply(c, pair(word), pair(word >> 4), pair(word >> 8), pair(word >> 12), b0, b1);
    }

    // Adds a group's product to the sums: `sums[i]` is row r (+ 8 for i > 1) of stream 2 * (lane % 4) + i % 2. `x` are
    // the lane's activations of the group, `totals` the group's sums of its two streams, `groups` apart.
    static __device__ __forceinline__ void add(float (&sums)[4], const Held& held, const uint4* x, const float* totals,
                                               int groups) {
        const float one = -TOO_MUCH * totals[0], two = -TOO_MUCH * totals[groups];
        float c[4] = {one, two, one, two};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 a = x[2 * half], b = x[2 * half + 1], words = held.half[half];
            step(c, words.x, a.x, a.y);
            step(c, words.y, a.z, a.w);
            step(c, words.z, b.x, b.y);
            step(c, words.w, b.z, b.w);
        }
        const float2 scale = __half22float2(held.scales);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += (i < 2 ? scale.x : scale.y) * c[i];
    }
};

// Rows as they are. Of 64 input features a lane has eight neighbours in either half, so that four lanes load 64 bytes of
// a row at a time.
struct Bf16 {
    static constexpr int GROUP = 64, DEPTH = 2;
    static constexpr bool TOTALS = false;

    struct Held {
        uint4 a[2], b[2];  // of rows r and r + 8
    };
    struct From {
        const uint4 *a, *b;
    };

    template <class E>
    static __device__ __forceinline__ int row(const Behind& behind, int tile, int r, bool second) {
        return E::row(behind, tile, r, second);
    }

    template <class E>
    static __device__ __forceinline__ const uint4* begin(const Weight& weight, const Behind& behind, int columns,
                                                         int tile, int r, bool second) {
        const auto row = static_cast<size_t>(E::row(behind, tile, r, second));
        return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(weight.words) + row * columns);
    }

    template <class E>
    static __device__ __forceinline__ From from(const Weight& weight, const Behind& behind, int columns, int tile,
                                                int lane) {
        const int r = lane / 4, place = lane % 4;
        return {begin<E>(weight, behind, columns, tile, r, false) + place,
                begin<E>(weight, behind, columns, tile, r, true) + place};
    }

    static __device__ __forceinline__ Held load(const From& from, int group) {
        const uint4 *a = from.a + group * 8, *b = from.b + group * 8;
        return {{__ldcs(a), __ldcs(a + 4)}, {__ldcs(b), __ldcs(b + 4)}};
    }

    template <class E>
    static __device__ __forceinline__ void ahead(const Weight& weight, const Behind& behind, int columns, int tile,
                                                 int) {
        const unsigned bytes = 8 * columns * sizeof(__nv_bfloat16);  // eight neighbouring rows, twice
        ask(begin<E>(weight, behind, columns, tile, 0, false), bytes);
        ask(begin<E>(weight, behind, columns, tile, 0, true), bytes);
    }

    static __device__ __forceinline__ int place(int lane) { return lane % 4 * 8; }

    static __device__ __forceinline__ void add(float (&sums)[4], const Held& held, const uint4* x, const float*, int) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 a = held.a[half], b = held.b[half], activations = x[4 * half];
            multiply(sums, a.x, b.x, a.y, b.y, activations.x, activations.y);
            multiply(sums, a.z, b.z, a.w, b.w, activations.z, activations.w);
        }
    }
};
