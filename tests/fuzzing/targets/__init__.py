"""What takes strangers' bytes: one module for each, with its `TARGET`."""
