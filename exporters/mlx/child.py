"""Runs in the Python that has mlx-lm, and imports nothing of packlight: what MLX makes of a folder.

``python child.py FOLDER OUT TOKENS PROMPT STORED`` loads the folder as mlx-lm does and prints one
JSON object per line: ``versions``; ``digests``, the SHA-256 of every matrix as ``mx.dequantize``
decodes it in float32. It writes float32 logits ``[tokens, vocabulary]`` to files in OUT:

    whole    with the quantized kernels, computed in float32, all tokens in one call
    cached   the same through the KV cache: PROMPT tokens, then one at a time
    stored   as an app computes, in the folder's own type; the first STORED tokens

It ends with the process at the other end of its stdin.
"""

import hashlib
import json
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """See the module."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    tokens = json.loads(sys.argv[3])
    prompt, stored = int(sys.argv[4]), int(sys.argv[5])
    threading.Thread(target=end_with_parent, daemon=True).start()
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries is no event

    def emit(event: object) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    emit({"versions": {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}})

    def save(name: str, logits: "mx.array") -> None:
        values = logits[0].astype(mx.float32)
        mx.eval(values)
        (out / name).write_bytes(bytes(memoryview(values)))

    model, _ = load_model(folder, lazy=True)
    if stored:
        save("stored", model(mx.array([tokens[:stored]])))
    model.set_dtype(mx.float32)  # scales and biases, too; the codes are what they are
    digests = {}
    for name, module in tree_flatten(model.leaf_modules(), is_leaf=is_module):
        if hasattr(module, "scales"):
            decoded = mx.dequantize(
                module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
                mode=module.mode, dtype=mx.float32,
            )  # fmt: skip
            mx.eval(decoded)
            digests[f"{name}.weight"] = hashlib.sha256(memoryview(decoded)).hexdigest()
    emit({"digests": digests})
    save("whole", model(mx.array([tokens])))
    cache = make_prompt_cache(model)
    parts = [model(mx.array([tokens[:prompt]]), cache=cache)]
    for token in tokens[prompt:]:
        parts.append(model(mx.array([[token]]), cache=cache))
        mx.eval(parts[-1])
    save("cached", mx.concatenate(parts, axis=1))
    emit({"done": True})


def is_module(value: object) -> bool:
    """Whether a leaf of mlx's tree is a module."""
    from mlx.nn import Module

    return isinstance(value, Module)


def end_with_parent() -> None:
    """Wait for the end of stdin, then end the process."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
