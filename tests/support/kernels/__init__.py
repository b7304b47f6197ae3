"""What the tests of the kernels share: a float64 oracle, cases, and a recorder of launches."""
