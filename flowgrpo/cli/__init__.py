"""The command line: one file per command.

main.py     the table of commands, exit codes
options.py  their options, and how they are read
compare.py  a study, from its options to its tables
targets.py  runs, checkpoints, recipes and models that a command line names
"""
