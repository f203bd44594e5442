"""Row-wise int8: a byte a weight and one scale for each row of the matrix."""

from registry.api import LinearFormat, Requirement, unsupported

MOST_ROWS = 8
"""Rows of activations that the kernel takes: a step has one a stream. A prefill has more, and is torch's."""


class Int8Rowwise(LinearFormat):
    """Symmetric: a row's largest weight becomes 127. On CUDA a kernel multiplies a step's rows; else torch does."""

    requires = (Requirement("triton>=3.6", "pip install 'triton>=3.6'; a CUDA build of torch brings it"),)
    executions = ("eager", "cuda_graph")
    min_capability = (8, 0)  # Triton's own least

    @classmethod
    def check(cls, request):
        """Refuse a step with more rows than the kernel takes: torch's product would be measured under its name."""
        if request.device == "cuda" and request.batch_size > MOST_ROWS:
            raise unsupported(
                f"the int8-rowwise kernel takes up to {MOST_ROWS} streams, not {request.batch_size}",
                f"Use protocol.batch_size={MOST_ROWS} or less",
            )

    @classmethod
    def kernel_names(cls, options, device):
        """What a profiler has to see in a step."""
        return ("int8_gemv",) if device == "cuda" else ()

    def takes(self, x):
        """Whether these activations go to the kernel."""
        return x.is_cuda and x.numel() <= MOST_ROWS * x.shape[-1]

    def convert(self, linear):
        """Quantise `linear`: int8 `[out, in]` and a scale `[out, 1]` in the model's dtype."""
        import torch

        from rfloor_example.int8_gemv import gemv

        takes = self.takes

        class Int8Linear(torch.nn.Module):
            def forward(self, x):
                if takes(x):
                    return gemv(x, self.weight, self.scale, self.bias)
                product = torch.nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.squeeze(1)
                return product if self.bias is None else product + self.bias

        scale = linear.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        layer = Int8Linear()
        layer.register_buffer("weight", (linear.weight / scale).round().clamp(-127, 127).to(torch.int8))
        layer.register_buffer("scale", scale)
        layer.bias = linear.bias
        return layer

    def dequantize(self, module):
        """The weight as multiplied, `[out, in]`, in the model's dtype."""
        return module.weight * module.scale
