"""Other projects' functions by their own signatures, one module per project."""
