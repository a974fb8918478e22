"""What adapters are called: names, versions, aliases and compositions, in a database and in records beside the bytes."""
