"""Decode attention kernels, one a file."""
