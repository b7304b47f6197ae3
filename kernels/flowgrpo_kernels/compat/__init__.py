"""Other projects' functions by their own signatures, one module a project."""
