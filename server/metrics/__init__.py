"""The metrics at /metrics: they contain no prompts or answers, and every label has a bounded number of values."""
