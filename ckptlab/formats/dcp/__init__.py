"""torch.distributed.checkpoint: read metadata.py, items.py, boxes.py, axes.py, keys.py, read.py in this order."""
