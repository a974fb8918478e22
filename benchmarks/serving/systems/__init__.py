"""What is measured: this server and its peers, each in a process of its own."""
