"""Measures the server against its peers: `python -m benchmarks.serve`. No part of the installed package."""
