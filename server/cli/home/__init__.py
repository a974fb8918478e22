"""The commands that work on HOME itself, whether or not a server is running: for its owner, and without a key."""
