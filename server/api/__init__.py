"""The HTTP API. It checks requests and resolves names, so that the engine needn't know either."""
