"""What clients are told of faults: its form by path, its status, its fields."""
