"""Providers that a suite compares: this project, and flow_grpo's code, eager and compiled."""
