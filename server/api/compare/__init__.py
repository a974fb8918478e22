"""POST /compare: one prompt under several adapter expressions."""
