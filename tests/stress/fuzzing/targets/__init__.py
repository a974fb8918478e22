"""Kinds of untrusted bytes: a module for each, with its `TARGET`."""
