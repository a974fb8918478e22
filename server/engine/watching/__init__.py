"""What the event loop can tell of the engine from outside: that it hangs, and how fast its queue moves."""
