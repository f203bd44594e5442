"""The product in CUDA C++, with what stands before and behind it fused around it, and how it is launched."""
