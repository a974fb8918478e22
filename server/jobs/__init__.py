"""Durable jobs: submitted, queued, leased to workers, and run in a process of their own."""
