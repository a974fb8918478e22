"""The process that serves: what it is built from, its sizes, its log, its beginning and its end."""
