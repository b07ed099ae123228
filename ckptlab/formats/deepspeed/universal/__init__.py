"""DeepSpeed's universal format: `zero/<tensor>/<state>.pt`, whole tensors, beside the model files of the run.

Stages up to 2 store a dict with `param` and what a loader needs to cut it (`cat_dim`, `vocab_tensor`, …); stage 3
stores a bare flat tensor. Source: what DeepSpeed 0.19.8's `ds_to_universal` wrote, and what its loader was seen to
need.
"""

from ckptlab.formats.deepspeed.universal.read import FOLDER, OPTIMIZER, read_universal

__all__ = ["FOLDER", "OPTIMIZER", "read_universal"]
