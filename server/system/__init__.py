"""The machine and this process: control groups, memory and threads; and helpers for messages to users."""
