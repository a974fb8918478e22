"""Cost of separate engine processes: API processes with Ray Serve, compared with the single process."""
