"""Access: projects, their keys, limits and usage, and the audit log."""
