"""What is told of requests to those who run the server: the line of each in the log, and its spans."""
