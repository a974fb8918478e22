"""What users would pick instead: how each is set up, started and asked."""
