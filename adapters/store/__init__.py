"""Where adapters' bytes lie: immutable directories, named by digest."""
