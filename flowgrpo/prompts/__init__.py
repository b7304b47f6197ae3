"""Prompt sets -> K prompts x G samples."""
