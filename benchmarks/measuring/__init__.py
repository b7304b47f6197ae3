"""Time, memory, launches and waits of a call, and the run of a suite that takes them."""
