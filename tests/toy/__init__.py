"""A format of artifacts for tests/test_extension.py, which puts it beside those that ship.

``NAME.toy``: tensors one after the other, codes then scales; ``NAME.toy.json``: the config, and
where each tensor is.
"""
