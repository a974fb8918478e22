"""Hardware that isn't there, for tests of the code that uses it."""
