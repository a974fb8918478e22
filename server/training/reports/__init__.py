"""What came of a job: gate, card and metrics."""
