// What Python calls: checks, then the launch on PyTorch's current stream.
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include "product.h"

namespace {

using Maybe = std::optional<at::Tensor>;

constexpr int VECTOR = 16;  // bytes that a lane loads at a time

void check(const at::Tensor& tensor, at::ScalarType type, const char* name) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == type, name, " has to be contiguous ",
                type, " on a GPU, not ", tensor.scalar_type(), " of strides ", tensor.strides(), " on ", tensor.device());
}

void aligned(const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % VECTOR == 0, name, " has to begin at a multiple of ",
                VECTOR, " bytes");
}

void shaped(const at::Tensor& tensor, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK(tensor.sizes() == sizes, name, " has to be ", sizes, ", not ", tensor.sizes());
}

int64_t rows(const at::Tensor& words) { return words.size(0) * ROWS; }

Weight weight(const at::Tensor& words, const at::Tensor& scales, const Maybe& bias, int64_t columns) {
    check(words, at::kInt, "words");
    check(scales, at::kHalf, "scales");
    aligned(words, "words");
    TORCH_CHECK(words.dim() == 5 && words.size(1) * GROUP == columns, "words of ", words.sizes(), " are not of ", columns,
                " columns");
    shaped(words, {words.size(0), words.size(1), 2, 32, 4}, "words");
    shaped(scales, {words.size(0), words.size(1), 8, 2}, "scales");
    if (bias) {
        check(*bias, at::kBFloat16, "bias");
        shaped(*bias, {rows(words)}, "bias");
    }
    return {words.data_ptr(), static_cast<const __half2*>(scales.data_ptr()),
            bias ? static_cast<const __nv_bfloat16*>(bias->data_ptr()) : nullptr};
}

Before plain(const at::Tensor& x) {
    check(x, at::kBFloat16, "x");
    aligned(x, "x");
    TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= STREAMS, "x has to be of up to ", STREAMS,
                " streams, not ", x.sizes());
    return {static_cast<const __nv_bfloat16*>(x.data_ptr()), nullptr, 0, static_cast<int>(x.size(1)),
            static_cast<int>(x.size(0))};
}

// int64, so many or more.
void counts(const at::Tensor& tensor, int64_t least, const char* name) {
    check(tensor, at::kLong, name);
    TORCH_CHECK(tensor.numel() >= least, name, " has to be of ", least, " or more, not ", tensor.numel());
}

Before normed(const at::Tensor& x, const Maybe& squares, double eps) {
    auto made = plain(x);
    if (!squares) return made;
    counts(*squares, x.size(0), "squares");
    made.squares = reinterpret_cast<const long long*>(squares->data_ptr());
    made.eps = static_cast<float>(eps);
    return made;
}

// Where blocks take their tiles as they come: int64, its first is 0 when the step begins.
unsigned long long* counter(const at::Tensor& tickets) {
    counts(tickets, 1, "tickets");
    return reinterpret_cast<unsigned long long*>(tickets.data_ptr());
}

Behind behind(Fused what, const at::Tensor& out, const at::Tensor& words) {
    Behind made{};
    made.what = what;
    made.out = out.data_ptr();
    made.rows = static_cast<int>(rows(words));
    return made;
}

void launch(const Before& before, const Weight& weight, const Behind& behind, int64_t warps, int64_t blocks) {
    const auto failed = product_launch(before, weight, behind, static_cast<int>(warps), static_cast<int>(blocks),
                                       c10::cuda::getCurrentCUDAStream());
    if (failed == cudaSuccess) return;
    cudaGetLastError();  // or whoever asks next takes it for his own
    TORCH_CHECK(false, "the product did not launch: ", cudaGetErrorString(failed));
}

// x: bf16 [streams, columns]; words and scales as backends/int4/layout.py packs them.
// Returns bf16 [streams, rows].
at::Tensor product(const at::Tensor& x, const at::Tensor& words, const at::Tensor& scales, const Maybe& bias,
                   int64_t warps, int64_t blocks) {
    auto out = at::empty({x.size(0), rows(words)}, x.options());
    launch(plain(x), weight(words, scales, bias, x.size(1)), behind(Fused::STORE, out, words), warps, blocks);
    return out;
}

// residual: float32 [streams, rows], added to; gain: bf16 [rows], of the next norm; scaled: bf16 [streams, rows], what
// that norm's product reads; squares: int64 [streams or more], added to.
void residual(const at::Tensor& x, const at::Tensor& words, const at::Tensor& scales, const at::Tensor& residual,
              const at::Tensor& gain, const at::Tensor& scaled, const at::Tensor& squares, int64_t warps,
              int64_t blocks) {
    check(residual, at::kFloat, "residual");
    check(gain, at::kBFloat16, "gain");
    check(scaled, at::kBFloat16, "scaled");
    counts(squares, x.size(0), "squares");
    shaped(residual, {x.size(0), rows(words)}, "residual");
    shaped(scaled, residual.sizes(), "scaled");
    shaped(gain, {rows(words)}, "gain");
    auto made = behind(Fused::RESIDUAL, residual, words);
    made.gain = static_cast<const __nv_bfloat16*>(gain.data_ptr());
    made.scaled = static_cast<__nv_bfloat16*>(scaled.data_ptr());
    made.squares = reinterpret_cast<unsigned long long*>(squares.data_ptr());
    launch(plain(x), weight(words, scales, {}, x.size(1)), made, warps, blocks);
}

// What stands behind a norm: x is bf16 [streams, columns], the residual stream times the norm's gain, and squares are
// int64 [streams or more], or none where x is normed already.

// out: bf16 [streams, rows / 2].
void swiglu(const at::Tensor& x, const Maybe& squares, double eps, const at::Tensor& words, const at::Tensor& scales,
            const at::Tensor& out, const at::Tensor& tickets, int64_t warps, int64_t blocks) {
    check(out, at::kBFloat16, "out");
    shaped(out, {x.size(0), rows(words) / 2}, "out");
    auto made = behind(Fused::SWIGLU, out, words);
    made.tickets = counter(tickets);
    launch(normed(x, squares, eps), weight(words, scales, {}, x.size(1)), made, warps, blocks);
}

// out: float32 [streams, rows].
void logits(const at::Tensor& x, const Maybe& squares, double eps, const at::Tensor& words, const at::Tensor& scales,
            const at::Tensor& out, const at::Tensor& tickets, int64_t warps, int64_t blocks) {
    check(out, at::kFloat, "out");
    shaped(out, {x.size(0), rows(words)}, "out");
    auto made = behind(Fused::LOGITS, out, words);
    made.tickets = counter(tickets);
    launch(normed(x, squares, eps), weight(words, scales, {}, x.size(1)), made, warps, blocks);
}

// q: bf16 [streams, q_heads * head_dim]; cos and sin: float32 [capacity, head_dim / 2];
// length: int32, 0-d; keys and values: bf16 [streams, kv_heads, capacity, head_dim].
void qkv(const at::Tensor& x, const Maybe& squares, double eps, const at::Tensor& words, const at::Tensor& scales,
         const Maybe& bias, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& length, const at::Tensor& q,
         const at::Tensor& keys, const at::Tensor& values, int64_t warps, int64_t blocks) {
    check(q, at::kBFloat16, "q");
    check(keys, at::kBFloat16, "keys");
    check(values, at::kBFloat16, "values");
    check(cos, at::kFloat, "cos");
    check(sin, at::kFloat, "sin");
    check(length, at::kInt, "length");
    TORCH_CHECK(keys.dim() == 4 && q.dim() == 2 && cos.dim() == 2, "keys, q and cos have to be of 4, 2 and 2 dimensions");
    auto made = behind(Fused::ROTARY, q, words);
    made.kv_heads = static_cast<int>(keys.size(1));
    made.capacity = static_cast<int>(keys.size(2));
    made.head_dim = static_cast<int>(keys.size(3));
    made.q_heads = static_cast<int>(q.size(1)) / made.head_dim;
    const int64_t heads = made.q_heads + 2 * made.kv_heads;
    TORCH_CHECK(made.rows == heads * made.head_dim, "a weight of ", made.rows, " rows is not one of ", heads, " heads of ",
                made.head_dim);
    shaped(q, {x.size(0), static_cast<int64_t>(made.q_heads) * made.head_dim}, "q");
    shaped(keys, {x.size(0), keys.size(1), keys.size(2), keys.size(3)}, "keys");
    shaped(values, keys.sizes(), "values");
    TORCH_CHECK(length.numel() == 1, "length has to be one number, not ", length.sizes());
    TORCH_CHECK(cos.size(0) >= made.capacity && cos.size(1) * 2 == made.head_dim, "cos has to be of the cache's ",
                made.capacity, " rows or more and of half a head, not ", cos.sizes());
    shaped(sin, cos.sizes(), "sin");
    made.cos = cos.data_ptr<float>();
    made.sin = sin.data_ptr<float>();
    made.length = length.data_ptr<int>();
    made.keys = static_cast<__nv_bfloat16*>(keys.data_ptr());
    made.values = static_cast<__nv_bfloat16*>(values.data_ptr());
    launch(normed(x, squares, eps), weight(words, scales, bias, x.size(1)), made, warps, blocks);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("product", &product);
    module.def("residual", &residual);
    module.def("swiglu", &swiglu);
    module.def("logits", &logits);
    module.def("qkv", &qkv);
}
