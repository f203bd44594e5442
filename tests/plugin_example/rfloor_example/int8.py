"""Row-wise int8: a byte a weight and one scale for each row of the matrix."""

from registry.api import LinearFormat


class Int8Rowwise(LinearFormat):
    """Symmetric: a row's largest weight becomes 127. The product widens the weights and scales its result."""

    executions = ("eager", "cuda_graph")

    def convert(self, linear):
        """Quantise `linear`: int8 `[out, in]` and a scale `[out, 1]` in the model's dtype."""
        import torch

        class Int8Linear(torch.nn.Module):
            def forward(self, x):
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
