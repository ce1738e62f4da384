"""Kernels of any size within a bound of memory: samples in blocks, per-sample gradients in groups, panels on disk.

`job` checks the arguments of a kernel, `samples` reads them, `probe` measures what two and four of them take, `plan`
and `items` say how often all of them go through the network and what each pass gathers, `passes` does it, `file` writes
panels.
"""
