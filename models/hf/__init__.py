"""Models as Hugging Face keeps them, one file a family: its config both ways, and a table of its tensors.

A family says what each of its tensors is; files, meshes and commands are `plait.train.convert`'s.
"""
