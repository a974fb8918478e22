"""Simulated comparison of ways to choose a replica: `python -m benchmarks.routing`."""
