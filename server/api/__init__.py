"""The HTTP API. It checks each request, and resolves the names in it, before the engine gets the request."""
