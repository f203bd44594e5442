// What Python calls: checks, then the launch on PyTorch's current stream.
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include "product.h"

namespace {

using Maybe = std::optional<at::Tensor>;

void check(const at::Tensor& tensor, at::ScalarType type) {
    TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == type);
}

int64_t rows(const at::Tensor& words) { return words.size(0) * 16; }

Weight weight(const at::Tensor& words, const at::Tensor& scales, const Maybe& bias, int64_t columns) {
    check(words, at::kInt);
    check(scales, at::kHalf);
    TORCH_CHECK(words.size(1) * 128 == columns && scales.size(0) == words.size(0) && scales.size(1) == words.size(1));
    if (bias) check(*bias, at::kBFloat16);
    TORCH_CHECK(!bias || bias->numel() == rows(words));
    return {words.data_ptr(), static_cast<const __half2*>(scales.data_ptr()),
            bias ? static_cast<const __nv_bfloat16*>(bias->data_ptr()) : nullptr};
}

Before plain(const at::Tensor& x) {
    check(x, at::kBFloat16);
    TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= 8);
    return {static_cast<const __nv_bfloat16*>(x.data_ptr()), nullptr, 0, static_cast<int>(x.size(1)),
            static_cast<int>(x.size(0))};
}

Before normed(const at::Tensor& x, const Maybe& squares, double eps) {
    auto made = plain(x);
    if (!squares) return made;
    check(*squares, at::kLong);
    TORCH_CHECK(squares->numel() >= x.size(0));
    made.squares = reinterpret_cast<const long long*>(squares->data_ptr());
    made.eps = static_cast<float>(eps);
    return made;
}

// Where blocks take their tiles as they come: int64, its first is 0 when the step begins.
unsigned long long* counter(const at::Tensor& tickets) {
    check(tickets, at::kLong);
    TORCH_CHECK(tickets.numel() >= 1);
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
    check(residual, at::kFloat);
    check(squares, at::kLong);
    for (const auto& tensor : {gain, scaled}) check(tensor, at::kBFloat16);
    TORCH_CHECK(residual.size(0) == x.size(0) && residual.size(1) == rows(words));
    TORCH_CHECK(scaled.sizes() == residual.sizes() && gain.numel() == residual.size(1) && squares.numel() >= x.size(0));
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
    check(out, at::kBFloat16);
    TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == rows(words) / 2);
    auto made = behind(Fused::SWIGLU, out, words);
    made.tickets = counter(tickets);
    launch(normed(x, squares, eps), weight(words, scales, {}, x.size(1)), made, warps, blocks);
}

// out: float32 [streams, rows].
void logits(const at::Tensor& x, const Maybe& squares, double eps, const at::Tensor& words, const at::Tensor& scales,
            const at::Tensor& out, const at::Tensor& tickets, int64_t warps, int64_t blocks) {
    check(out, at::kFloat);
    TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == rows(words));
    auto made = behind(Fused::LOGITS, out, words);
    made.tickets = counter(tickets);
    launch(normed(x, squares, eps), weight(words, scales, {}, x.size(1)), made, warps, blocks);
}

// q: bf16 [streams, q_heads * head_dim]; cos and sin: float32 [capacity, head_dim / 2];
// length: int32, 0-d; keys and values: bf16 [streams, kv_heads, capacity, head_dim].
void qkv(const at::Tensor& x, const Maybe& squares, double eps, const at::Tensor& words, const at::Tensor& scales,
         const Maybe& bias, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& length, const at::Tensor& q,
         const at::Tensor& keys, const at::Tensor& values, int64_t warps, int64_t blocks) {
    for (const auto& tensor : {q, keys, values}) check(tensor, at::kBFloat16);
    for (const auto& tensor : {cos, sin}) check(tensor, at::kFloat);
    check(length, at::kInt);
    auto made = behind(Fused::ROTARY, q, words);
    made.kv_heads = static_cast<int>(keys.size(1));
    made.capacity = static_cast<int>(keys.size(2));
    made.head_dim = static_cast<int>(keys.size(3));
    made.q_heads = static_cast<int>(q.size(1)) / made.head_dim;
    TORCH_CHECK(made.rows == (made.q_heads + 2 * made.kv_heads) * made.head_dim && keys.sizes() == values.sizes());
    TORCH_CHECK(q.size(0) == x.size(0) && keys.size(0) == x.size(0));
    TORCH_CHECK(cos.size(0) >= made.capacity && cos.size(1) * 2 == made.head_dim && cos.sizes() == sin.sizes());
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
