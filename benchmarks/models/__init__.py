"""The models that are measured, their random weights, and the cases of the suites."""
