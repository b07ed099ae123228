"""Rules that give tensors layouts (strategies.py) and deal layers to stages (stages.py); a model that a few numbers
describe (transformer.py)."""
