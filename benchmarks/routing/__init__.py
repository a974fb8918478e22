"""Ways of choosing a replica, compared in a simulation: `python -m benchmarks.routing`."""
