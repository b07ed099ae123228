"""DeepSpeed's step folders, and its universal ones (`universal`).

Reading: names, files, headers (what each file says), optimizer, module, layouts, checks, assemble, read. Writing:
options, target, pipeline, info, write. format.py is the face to everybody else.
"""
