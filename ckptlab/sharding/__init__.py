"""Rules that give tensors layouts (strategies.py) and deal layers to stages (stages.py); a model that a few numbers
describe (transformer.py); the same model under another program's names (families/)."""


def __getattr__(name: str) -> object:
    """`families`, when it is asked for."""
    if name == "families":
        import ckptlab.sharding.families as found

        return found
    raise AttributeError(f"module 'ckptlab.sharding' has no attribute {name!r}")
