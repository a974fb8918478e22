"""Names, versions, aliases and compositions of adapters: in a database, and in records beside the bytes."""
