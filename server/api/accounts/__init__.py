"""What the operator does over HTTP, keys, projects and the audit list; and what everybody used."""
