"""HOME and the bucket: where bytes are, and the room left for them."""
