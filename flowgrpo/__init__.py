"""Flow-GRPO: online reinforcement learning for flow-matching text-to-image models.

Importing the package imports nothing heavy; torch and diffusers load with the module that needs
them::

    from flowgrpo import nano, train

    config = nano.recipe(steps=200)
    summary = train.run(config)
"""

__version__ = "0.1.0"
