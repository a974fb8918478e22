"""Measures serving and training against what users would pick instead. No part of the installed package.

A command each: serve, train, methods, adapters, beside; `peers` sets the peers up, `report` makes
docs/benchmarks.md of what the others wrote.
"""
