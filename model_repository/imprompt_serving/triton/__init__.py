"""Triton models around engines, denoiser, and pipeline: the only modules that use `triton_python_backend_utils`."""
