"""Durable jobs: submitted, queued, leased to workers, and each run in a process of its own."""
