"""What /metrics shows. No text of anybody's, and no label without a bound."""
