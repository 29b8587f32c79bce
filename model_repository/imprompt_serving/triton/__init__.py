"""The only modules that know ``triton_python_backend_utils``: thin shells around engines, denoiser and pipeline."""
