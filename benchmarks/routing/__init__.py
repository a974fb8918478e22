"""Ways of choosing a replica, compared in a simulation: `python -m benchmarks.routing` makes docs/cluster/routing.md."""
