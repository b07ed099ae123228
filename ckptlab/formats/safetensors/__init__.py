"""Safetensors: whole tensors, one file or several with an index."""
