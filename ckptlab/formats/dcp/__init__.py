"""torch.distributed.checkpoint, whichever library wrote it.

Reading: metadata.py, items.py, boxes.py, axes.py, keys.py, assemble.py, read.py in this order; megatron.py and ranks.py
read what Megatron-core and FSDP's own files (dtensors.py) have otherwise. Writing: options.py, target.py, styles.py,
labels.py, index.py (`.metadata`), write.py.
"""
