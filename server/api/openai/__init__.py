"""The routes under /v1, in the form that the official `openai` client expects."""
