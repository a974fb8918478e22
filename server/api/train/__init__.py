"""/train and /datasets: the routes, what they take and answer, and the job that a body becomes."""
