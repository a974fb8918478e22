"""/v1 as the official `openai` client speaks it. Its faults look as that client expects: see `errors`."""
