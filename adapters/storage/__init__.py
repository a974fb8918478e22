"""Storage of bytes: durable files, blobs and folders, in a directory or in a bucket."""
