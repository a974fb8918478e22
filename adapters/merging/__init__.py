"""Several adapters become one new adapter."""
