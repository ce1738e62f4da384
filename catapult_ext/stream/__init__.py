"""Kernels of any size within a bound of memory: samples in blocks, per-sample gradients in groups, panels on disk."""
