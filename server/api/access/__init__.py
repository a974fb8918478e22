"""Who may ask, and how much: sites, keys, bodies, quotas, and room for what waits."""
