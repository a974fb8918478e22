"""What it costs that engines are elsewhere: API processes beside Ray Serve, against the single process."""
