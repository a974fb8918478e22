"""Scaling curves: what more adapters, higher ranks, larger blends, longer contexts and more streams cost."""
