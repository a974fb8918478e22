"""One module for each revision. A released revision never changes."""
