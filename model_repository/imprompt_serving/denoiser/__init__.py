"""Runs the UNet loop for all active requests: jobs, schedulers, and batching of their steps."""
