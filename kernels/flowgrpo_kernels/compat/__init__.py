"""Other projects' functions by their own signatures, one module per project.

tables.py    a schedule's table, and the rows of timesteps, without a host read
steps.py     sampling and scoring with mean and x0, one pass each
patch.py     replacing and putting back, after a comparison of signatures
"""
