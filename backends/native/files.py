"""What the kernels are made of, for a cell's identity."""

NATIVE = ("product.cu", "product.h", "formats.cuh", "endings.cuh", "binding.cpp", "launches.yaml")
