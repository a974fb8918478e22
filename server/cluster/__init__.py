"""Many machines: engine replicas on Ray Serve, and which of them a request goes to; with the extra `cluster`."""
