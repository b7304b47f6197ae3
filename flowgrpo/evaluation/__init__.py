"""Evaluation: held-out prompts -> images -> scores, tables and pictures.

evaluation_set.py  prompts and their seeds
evaluate.py        images, every reward, the accuracy and its interval
kl.py              distance of the trained model from the untrained one
quality.py         figures that no reward asks for, and how far they may move
statistics.py      means over tasks, bootstrap, diversity
table.py           evaluations side by side
picture_sets.py    pictures that another system made, from files to scores
systems.py         systems side by side in the paper's form: table.md, evaluation.json
pictures.py        grids of images, and the curve
"""
