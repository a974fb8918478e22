"""Tests of /metrics."""
