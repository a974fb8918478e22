"""/adapters and /compositions: the routes, what they take and answer, and adapters by name."""
