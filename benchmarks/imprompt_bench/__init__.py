"""Latency and load harness, and its reports."""
