"""Everything that runs inside Triton: engine runners, denoiser, pipeline, and the launcher that starts the server."""
