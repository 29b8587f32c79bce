"""The UNet loop of all active requests: jobs, schedulers, batching of their steps."""
