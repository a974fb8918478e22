"""A server on many machines: engine replicas on Ray Serve, and routing. Needs the extra `cluster`."""
