"""What the operator does with everything stored: back up, restore, move, check."""
