"""Programs that are no suite: a kernel outside the package, checks of kernels and rewards."""
