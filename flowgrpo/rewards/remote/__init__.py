"""Rewards behind HTTP: the client, the server, and judges with an OpenAI-compatible API."""
