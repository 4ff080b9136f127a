"""Kernels for the memory-bound decode step, written in Pallas."""
