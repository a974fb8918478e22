"""Who may ask: which sites, by which names, through which proxies."""
