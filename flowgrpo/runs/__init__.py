"""A run on disk and on the terminal.

monitor.py      all that surrounds the loop: logs, evaluations, pictures, checkpoints, summary
directory.py    the run directory, and how it goes on
content.py      fingerprints of prompts and weights, which a continuation is compared with
state.py        trained weights, optimizer, average: what a checkpoint holds
checkpoints.py  checkpoints on disk
export.py       trained weights for diffusers, and into a policy
model_card.py   README.md beside them
loggers.py      TensorBoard, Weights & Biases
display.py      the terminal: progress, tables
banner.py       the lines that a run begins with
process.py      threads, determinism, versions, signals
"""
