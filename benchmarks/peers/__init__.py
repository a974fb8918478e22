"""The peers, which users might pick instead: how each is installed, started and queried."""
