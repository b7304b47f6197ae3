"""Held-out prompts -> images -> scores, tables and pictures."""
