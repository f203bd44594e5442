// What a launch is told: plain structs, so that the kernel is compiled without PyTorch's headers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// What stands before and behind the product.
enum class Fused {
    STORE,     // bf16 activations; bf16 [streams][rows]
    RESIDUAL,  // bf16 activations; added to float [streams][rows]
    SWIGLU,    // float activations, normed; bf16 [streams][rows / 2], gate and up paired
    LOGITS,    // float activations, normed; float [streams][rows]
    ROTARY,    // float activations, normed; q as bf16 [streams][q_heads * head_dim], k and v into the cache
};

struct Before {
    const void* x;  // [streams][columns]
    const __nv_bfloat16* gain;  // [columns], where normed
    float eps;
    int columns, streams;
};

struct Weight {
    const uint4* words;
    const __half2* scales;
    const __nv_bfloat16* bias;  // [rows] in the order of the packed rows, or null
};

struct Behind {
    Fused what;
    void* out;
    int rows;
    // ROTARY alone
    const float *cos, *sin;  // [capacity][head_dim / 2]
    const int* length;  // valid rows of the cache, this token's included
    __nv_bfloat16 *keys, *values;  // [streams][kv_heads][capacity][head_dim]
    int capacity, q_heads, kv_heads, head_dim;
};

cudaError_t int4_launch(const Before&, const Weight&, const Behind&, int warps, int blocks, cudaStream_t);
