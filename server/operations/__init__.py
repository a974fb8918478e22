"""Backs up, restores, moves and checks stored data, for the operator."""
