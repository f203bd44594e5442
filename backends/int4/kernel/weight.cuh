// A weight as a product's warps read it. The layout is backends/int4/layout.py's: a tile is 16 output features, rows r and
// r + 8 of it what `mma.m16n8k16` wants of a lane, r = lane / 4; of a group of 128 input features a lane has 32
// neighbours, from 32 * (lane % 4) on, for which the activations follow suit.
#pragma once
#include "product.h"

constexpr int ROWS = 16, GROUP = 128, STREAMS = 8;

// c += a tile's product; a0 and a2 are of row r, a1 and a3 of row r + 8.
__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Codes become bf16 by putting them behind the exponent of 128: 128 + code is exact, and what the 136 too much of each
// weight (the 8 that a code of zero weight has with it) adds is taken off a group's sum by the sum of its activations
// (float32, exact to 2^-23 of the larger term). So a weight costs one instruction, not the three of a conversion.
constexpr unsigned CODES = 0x000f000fu, BEHIND_128 = 0x43004300u;
constexpr float TOO_MUCH = 136;

__device__ __forceinline__ unsigned pair(unsigned word) {
    unsigned made;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(made) : "r"(word), "r"(CODES), "r"(BEHIND_128));  // (a & b) | c
    return made;
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

__device__ __forceinline__ void step(float (&c)[4], unsigned word, unsigned b0, unsigned b1) {
    multiply(c, pair(word), pair(word >> 4), pair(word >> 8), pair(word >> 12), b0, b1);
}

// Adds a group's product to the sums: `sums[i]` is row r (+ 8 for i > 1) of stream 2 * (lane % 4) + i % 2. `x` are the
// lane's activations of the group, sixteen bytes of them every four, `off` the sums of both streams' times -136.
__device__ __forceinline__ void add(float (&sums)[4], const Held& held, const uint4* x, float2 off) {
    float c[2][4] = {{off.x, off.y, off.x, off.y}};  // apart, so that a chain of products is half as long
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 a = x[8 * half], b = x[8 * half + 4], words = held.half[half];
        step(c[half], words.x, a.x, a.y);
        step(c[half], words.y, a.z, a.w);
        step(c[half], words.z, b.x, b.y);
        step(c[half], words.w, b.z, b.w);
    }
    const float2 scale = __half22float2(held.scales);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += (i < 2 ? scale.x : scale.y) * (c[0][i] + c[1][i]);
}
