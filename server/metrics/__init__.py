"""The metrics that /metrics shows. They contain no user's text, and every label has a bounded number of values."""
