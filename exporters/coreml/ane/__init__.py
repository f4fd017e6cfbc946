"""The preset ``iphone-ane``: packages of static shapes for the Neural Engine. *Experimental: never
run on a phone by us.*

    planning.py   which models and grids it takes; the chunks, their files and bytes
    graph.py      a package's functions as a MIL program
    writer.py     the packages and ``chunks.json``
    runtime.py    the packages as one runtime
    inspection.py describes them together

A model is a folder ``NAME-ane`` of packages, each with two functions of the same weights:
``prefill`` takes 64 ids, ``decode`` one. They run one after the other::

    embedding.mlpackage   ids, positions → hidden, rotary tables        (on the CPU)
    blocks_1.mlpackage    hidden, tables, masks, caches → hidden, new keys and values
    …
    head.mlpackage        hidden → logits, in pieces of the vocabulary

The KV cache is the caller's: an input that the graph only reads. The caller writes the new keys and
values into it, because the Neural Engine's compiler refuses graphs that write states.
"""
