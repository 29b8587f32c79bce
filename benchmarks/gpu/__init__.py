"""Measure engines, denoiser and server on one GPU at full size, next to diffusers: `python benchmarks/gpu`."""
