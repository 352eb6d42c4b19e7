"""Kernels for NVIDIA Hopper, through Mosaic GPU (`plgpu.kernel`)."""
