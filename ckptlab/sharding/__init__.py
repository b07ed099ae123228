"""Rules that give tensors layouts (strategies.py; rules.py, those that users write) and deal layers to stages
(stages.py); a model that a few numbers describe (transformer.py); the same model under another program's names
(families/)."""

from ckptlab.lazily import loader

__all__, __getattr__ = loader(__name__, {}, ["families"])
