"""The serving benchmark: loads, the systems that take them, and what is measured of each."""
