"""/adapters and /compositions: the routes, and what they take and answer."""
