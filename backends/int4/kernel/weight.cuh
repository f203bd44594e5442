// A weight as a product's warps read it. The layout is backends/int4/layout.py's: a tile is 16 output features, rows r and
// r + 8 of it what `mma.m16n8k32` wants of a lane, r = lane / 4; of a group of 128 input features a lane has 32
// neighbours, from 32 * (lane % 4) on, for which the activations follow suit.
#pragma once
#include "product.h"

constexpr int DIGITS = 2;  // of an activation

// c += a tile's product; a0 and a2 are of row r, a1 and a3 of row r + 8, four input features in each.
__device__ __forceinline__ void multiply(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A weight is a nibble in two's complement. At the upper end of a byte it is sixteen times itself, sign and all, so that
// one operation makes four numbers of it, or two.
constexpr unsigned UPPER = 0xf0f0f0f0u;
constexpr int UPPER_IS = 16;

__device__ __forceinline__ void step(int (&c)[4], unsigned word, unsigned next, unsigned b0, unsigned b1) {
    multiply(c, word & UPPER, word << 4 & UPPER, next & UPPER, next << 4 & UPPER, b0, b1);
}

// What a lane has of a group.
struct Held {
    uint4 half[2];
    __half2 scales;  // of rows r and r + 8
};

// A lane's part of a tile, from a group on.
struct Part {
    const uint4* words;
    const __half2* scales;

    __device__ __forceinline__ Part(const Weight& weight, int groups, int tile, int group, int lane) {
        const size_t at = static_cast<size_t>(tile) * groups + group;
        words = static_cast<const uint4*>(weight.words) + at * 64 + lane;
        scales = weight.scales + at * 8 + lane / 4;
    }

    // Of the group so many further.
    __device__ __forceinline__ Held load(int further) const {
        return {{__ldcs(words + further * 64), __ldcs(words + further * 64 + 32)}, scales[further * 8]};
    }

    __device__ __forceinline__ void on(int groups) {
        words += groups * 64;
        scales += groups * 8;
    }
};

// Adds a group's product to the sums: `sums[i]` is row r (+ 8 for i > 0) of stream lane % 4. `x` are digits of the group's
// activations, sixteen bytes every eight, `unit` what they count, over UPPER_IS. Whole numbers, so exact: a group's sum is
// 128 * (16 * 8) * 2^15 at most.
__device__ __forceinline__ void add(float (&sums)[2], const Held& held, const uint4* x, float unit) {
    int c[4] = {};  // of row r the upper digit and the lower, then of row r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 digits = x[8 * half], words = held.half[half];
        step(c, words.x, words.y, digits.x, digits.y);
        step(c, words.z, words.w, digits.z, digits.w);
    }
    const float2 scale = __half22float2(held.scales);
    sums[0] += scale.x * unit * static_cast<float>(256 * c[0] + c[1]);
    sums[1] += scale.y * unit * static_cast<float>(256 * c[2] + c[3]);
}
