"""Where bytes are kept: files that are whole or absent, buckets, copies of folders in them."""
