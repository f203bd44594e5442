"""What the kernel is made of, for a cell's identity."""

FILES = ("product.cu", "product.h", "weight.cuh", "endings.cuh", "binding.cpp", "launches.yaml")
