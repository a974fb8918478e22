"""The machine below the server: control groups, memory, threads, the program's name."""
