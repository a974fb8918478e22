"""Durable jobs in the database, and their files."""
