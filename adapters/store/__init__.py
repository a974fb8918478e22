"""The stores of adapters' bytes: immutable directories, named by digest."""
