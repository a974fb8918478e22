"""HOME and the bucket, which have everything that is stored, and a reserve of disk space."""
