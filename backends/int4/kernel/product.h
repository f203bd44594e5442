// What a launch is told: plain structs, so that the kernel is compiled without PyTorch's headers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Output features of a tile, input features of a group, and streams that a launch takes at most.
constexpr int ROWS = 16, GROUP = 128, STREAMS = 4;

// What stands behind the product.
enum class Fused {
    STORE,     // bf16 [streams][rows]
    RESIDUAL,  // added to float [streams][rows], for the norm that comes next
    SWIGLU,    // bf16 [streams][rows / 2], gate and up paired
    LOGITS,    // float [streams][rows]
    ROTARY,    // q as bf16 [streams][q_heads * head_dim], k and v into the cache
};

// Activations. Behind a norm they are the residual stream times the norm's gain, and the sums are multiplied by its scale.
struct Before {
    const __nv_bfloat16* x;  // [streams][columns]
    const long long* squares;  // [streams], the sum of the stream's squares in 1 / UNIT; null where nothing is normed
    float eps;
    int columns, streams;
};

struct Weight {
    const void* words;  // as backends/int4/layout.py packs it
    const __half2* scales;
    const __nv_bfloat16* bias;  // [rows] in the order in which the weight has them, or null
};

struct Behind {
    Fused what;
    void* out;
    int rows;
    // Tiles that blocks took beyond their first two, 0 when the step begins; null: each block's are fixed beforehand.
    unsigned long long* tickets;
    // RESIDUAL alone
    const __nv_bfloat16* gain;  // [rows], of the next norm
    __nv_bfloat16* scaled;  // [streams][rows]
    unsigned long long* squares;  // [streams], added to
    // ROTARY alone
    const float *cos, *sin;  // [capacity][head_dim / 2]
    const int* length;  // rows of the cache, without this token's
    __nv_bfloat16 *keys, *values;  // [streams][kv_heads][capacity][head_dim]
    int capacity, q_heads, kv_heads, head_dim;
};

// With so many warps a block, and so many blocks or as many as there are tiles.
cudaError_t product_launch(const Before&, const Weight&, const Behind&, int warps, int blocks, cudaStream_t);
