"""The frozen base model: loading, the forward pass, and the LoRA rank rows beside it."""
