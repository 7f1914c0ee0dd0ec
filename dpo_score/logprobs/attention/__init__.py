"""Attention over packs with shared prompts: `interface` is what transformers calls, the other files are its kernels.

Query, key and value of one layer and a prepared pack come in; the output of the layer goes out. A new kernel is a
class with the members of `interface.PreparedPack`, chosen in `packed.prepared_pack`; nothing here imports a model or
a run.
"""
