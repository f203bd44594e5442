"""Products with fused surroundings in CUDA C++: int4 and bf16 weights on tensor cores."""
