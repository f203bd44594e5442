"""Decode bodies, one a file; linear formats in `quant`, decode attention kernels in `attention`."""
