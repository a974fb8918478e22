"""The command line, a file for each command; those that work on HOME itself have a room, `home`."""
