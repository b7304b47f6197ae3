"""Several processes that train one model: the only room that knows of ranks.

world.py      the process group, what processes tell each other, and how all end when one fails
dealing.py    which chunks of rows, and which micro-steps, a rank has
gradients.py  sums of gradients in an order that does not depend on the number of ranks
"""
