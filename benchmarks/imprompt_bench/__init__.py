"""Benchmarks of latency and load, and their reports."""
