"""From logits to the next tokens, and to scores."""
