"""DeepSpeed's step folders, and its universal ones (`universal`).

Reading: names, header, optimfile and modelfile (what each file says), found (what they tell together), missing and
checks (what is wrong with them), files (where each stands), shapes, assigned (tensors without names), groups,
optimizer, module, whole (without ZeRO), assemble, read; layouts come from layouts, autotp or infer, experts from
experts and autoep. Writing: options, target, cautions (what is to be said of one), outside, pipeline, info, folding,
adopted (of sources of other formats), shards, states, write; muon is both. format.py is the face to everybody else.
"""
