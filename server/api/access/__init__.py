"""Who may ask, and how much: sites, names, proxies, bodies, and room for what waits."""
