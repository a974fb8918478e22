"""Notices that something became slow: the quick run's ratios beside the last recorded ones."""
