"""Comparison: several ways to train, on equal images and on equal seconds.

studies.py    what is compared: arms, base recipe, budget; the shipped studies, and files
compare.py    one comparison from its study to its tables
folder.py     the folder of a comparison: its study, its runs, and what each process did
running.py    a process a run: cores, memory, devices, stopping
machine.py    cores, memory, GPUs
progress.py   the runs on the terminal, while they train
readings.py   run directories -> scores at a budget, pooled over seeds
report.py     all that tables, picture and record say
table.py      the tables, on the terminal and in table.md
picture.py    comparison.png
record.py     comparison.json
"""
