"""The forward of a step as one native call: for CPUs with AVX2 or AVX-512, and 64-bit Arm."""
