"""Kernels for TPU, compiled by Mosaic; on other machines they run in Pallas's TPU interpreter."""
