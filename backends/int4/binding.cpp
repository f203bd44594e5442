// What Python calls: checks, then the launch on PyTorch's current stream.
#include <ATen/cuda/CUDAContext.h>
#include <torch/extension.h>

cudaError_t int4_launch(const void*, const void*, const void*, const void*, void*, int, int, int, int, int,
                        cudaStream_t);

// x: bf16 [streams, columns]; words and scales as backends/int4/layout.py packs them. Returns bf16 [streams, rows].
at::Tensor product(const at::Tensor& x, const at::Tensor& words, const at::Tensor& scales,
                   const std::optional<at::Tensor>& bias, int64_t warps, int64_t blocks) {
    TORCH_CHECK(x.is_cuda() && x.is_contiguous() && x.dim() == 2 && x.scalar_type() == at::kBFloat16);
    const int64_t streams = x.size(0), columns = x.size(1), rows = words.size(0) * 16;
    TORCH_CHECK(streams >= 1 && streams <= 8 && words.size(1) * 128 == columns);
    TORCH_CHECK(words.is_contiguous() && scales.is_contiguous() && scales.scalar_type() == at::kHalf);
    TORCH_CHECK(!bias || (bias->is_contiguous() && bias->scalar_type() == at::kBFloat16 && bias->numel() == rows));
    auto out = at::empty({streams, rows}, x.options());
    const auto failed = int4_launch(x.data_ptr(), words.data_ptr(), scales.data_ptr(), bias ? bias->data_ptr() : nullptr,
                                    out.data_ptr(), rows, columns, streams, warps, blocks,
                                    at::cuda::getCurrentCUDAStream());
    TORCH_CHECK(failed == cudaSuccess, cudaGetErrorString(failed));
    return out;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("product", &product); }
