"""What the event loop sees of the engine from outside: its outputs, that it hangs, how fast its queue moves."""
