"""Kernels for TPU, compiled by Mosaic; other machines run them in Pallas's TPU interpreter."""
