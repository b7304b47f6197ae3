"""The command line: one file per command.

main.py             the table of commands, exit codes
options.py          their options, and how they are read
compare.py          a study, from its options to its tables
evaluate_images.py  pictures of other systems, and evaluations in one table
targets.py          runs, checkpoints, recipes and models that a command line names
"""
