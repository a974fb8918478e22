"""Scaling curves: the cost of more adapters, higher ranks, larger blends, longer contexts and more streams."""
