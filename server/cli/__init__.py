"""The command line: a module for each group of commands, and helpers in `common` and `home`."""
