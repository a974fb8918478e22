"""A GPU that is not there, for tests of the code that uses one."""
