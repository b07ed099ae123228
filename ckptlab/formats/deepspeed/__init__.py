"""DeepSpeed's step folders, and its universal ones (`universal`).

Reading: names, headers (what each file says), files (where each stands), shapes, optimizer, module, checks, assemble,
read; layouts come from layouts, autotp or infer, experts from experts and autoep. Writing: options, target, cautions
(what is to be said of one), pipeline, info, folding, adopted (of sources of other formats), write; whole is both
without ZeRO, muon both of that optimizer. format.py is the face to everybody else.
"""
