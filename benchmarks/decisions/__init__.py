"""How good and how fast decisions are, next to what users would otherwise use."""
