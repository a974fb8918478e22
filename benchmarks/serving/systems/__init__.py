"""The measured systems: our server and its peers, each in a process of its own."""
