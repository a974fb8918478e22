"""POST /generate: the route, what it takes and answers, and the request that it becomes."""
