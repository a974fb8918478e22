"""Kinds of bytes from strangers: a module for each, with its `TARGET`."""
