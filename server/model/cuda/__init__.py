"""Triton kernels for serving on NVIDIA GPUs, each next to its torch form. Not yet run on a GPU.

A token's bits depend only on the token and its sequence, never on what else is in the step. Every product is a sum
of 16-row dots in one fixed order, a split of attention has absolute borders, and nothing is added atomically. So
one compiled program serves a row alone, in a batch, decoded or prefilled.

Counts and lists of work are in device memory. A launch's grid therefore doesn't depend on the step.

A kernel and its torch form take the same tensors, in the same order, and write the same outputs. The torch form
computes in fp32 and rounds once. `variants` lists what is compiled for a base.
"""
