"""The base's weights: they are found, converted once, and then mapped from the converted file."""
