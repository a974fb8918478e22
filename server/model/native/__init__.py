"""The forward of a step as one native call: for CPUs with AVX-512 and its bf16 products."""
