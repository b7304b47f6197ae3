"""Prompt sets -> K prompts x G samples.

load.py     a prompt set by its name, file or folder
hub.py      a data set of the Hugging Face Hub as one
batches.py  the prompts of an iteration, and the seeds of their samples
sets/       the sets of the package, and the programs that wrote them
"""
