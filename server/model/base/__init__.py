"""The base's weights: found, converted once, and mapped from then on."""
