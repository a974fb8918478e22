"""The machine and this process: control groups, memory, threads, and parts of messages."""
