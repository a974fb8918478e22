"""A fake GPU, for tests of code that uses one."""
