"""Forward, loss and backward of a micro-batch, and what is trained by them."""
