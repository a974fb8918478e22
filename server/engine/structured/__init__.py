"""Answers that match a schema or a pattern: grammars, vetted and followed token by token."""
