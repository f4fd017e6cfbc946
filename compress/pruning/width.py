"""Width pruning: removes MLP channels or key-value heads of every block and updates the others.

The calibration text is walked through the float model once; each block's weight is pruned with its
statistics and written, and both are dropped. Inputs of later blocks are the float model's: on the
demo model, inputs from pruned blocks chose no better (docs/pruning.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.calibration.walk import walk
from compress.checkpoint.safetensors import round_to, write_safetensors
from compress.checkpoint.save import stored_dtypes
from compress.checkpoint.sources import Source
from compress.decoder.config import Float32, split_name
from compress.errors import UnsupportedModelError
from compress.grids import Array
from compress.plan.cut import Cut
from compress.pruning.pruned import spread
from compress.pruning.surgery import choose, compensate

__all__ = ["narrow"]

ROLES = {"ffn": "down_proj", "heads": "o_proj"}


def narrow(
    source: Source,
    cut: Cut,
    windows: Sequence[Sequence[int]],
    folder: Path,
    work: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Remove columns of ``down_proj`` or ``o_proj`` in every stored block.

    Args:
        source: the whole model.
        cut: the pruned shape.
        windows: calibration text, all of one length.
        folder: gets a file per stored block with its changed weight.
        work: for the walk's hidden states, where they are large.
        progress: of the walk.

    Returns:
        By block index as a string: ``kept``, the retained channels or heads, and
        ``relative_errors``.

    Raises:
        UnsupportedModelError: heads that straddle the diagonal blocks of a Hessian this wide.
    """
    role = ROLES[cut.method]
    size = source.config.weight_shape(role)[1] // cut.total
    dtypes = stored_dtypes(source.checkpoint)
    found: dict[str, list[int]] = {}
    errors: dict[str, float | None] = {}
    blocks = walk(
        source.config, source.read, windows, hessian=True, roles=(role,), work=work,
        progress=progress,
    )  # fmt: skip
    for stats in blocks:
        for key, entry in stats.items():
            hessian = entry.hessian or ()
            if any(len(block) % size for block in hessian):
                raise UnsupportedModelError(
                    f"heads cannot be pruned: {size} columns of {role} belong to a key-value head, "
                    "and its inputs are too many for one Hessian"
                )
            weight = source.read(f"{key}.weight")
            retained = choose(weight, hessian, cut.retained, size=size, update=cut.update)
            columns = spread(retained, size)
            cutout = weight[:, columns]
            changed = compensate(weight, hessian, columns) if cut.update else cutout
            dtype = dtypes[role, "weight"]
            headers = {f"{key}.weight": (dtype, changed.shape)}
            write_safetensors(folder / f"{key}.safetensors", headers, [changed])
            block = str(split_name(f"{key}.weight")[0])
            found[block] = retained.tolist()
            errors[block] = relative_error(weight, columns, round_to(changed, dtype), entry)
    return {"kept": found, "relative_errors": errors}


def relative_error(
    weight: Float32, columns: Array, changed: Float32, stats: LayerStats
) -> float | None:
    """Squared output error ÷ squared output, on inputs held back from the Hessian.

    None where none were held back.
    """
    if stats.held_back is None:
        return None
    whole = stats.held_back @ weight.T
    left = whole - stats.held_back[:, columns] @ changed.T
    return float(np.square(left, dtype=np.float64).sum() / np.square(whole).sum(dtype=np.float64))
