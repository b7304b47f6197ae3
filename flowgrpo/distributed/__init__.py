"""Several processes that train one model: the only room that knows of ranks.

world.py      the process group, what processes tell each other, and how all end when one fails
dealing.py    which chunks of rows, and which micro-steps, a rank has
gradients.py  sums of gradients in an order that does not depend on the number of ranks
sharding.py   a model of which each rank has a piece (FSDP2)
pieces.py     pieces of tensors on disk (torch.distributed.checkpoint)
"""
