"""Serving and training in native code (C++), for CPUs with AVX2 or AVX-512 and for 64-bit Arm."""
