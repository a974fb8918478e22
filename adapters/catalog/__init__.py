"""Names, versions, aliases and compositions of adapters, in a database and in records stored with the bytes."""
