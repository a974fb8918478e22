"""Tokens guessed ahead and computed together, which changes no answer."""
