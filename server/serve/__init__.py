"""The serving process: build its parts, listen, serve, and stop."""
