"""Describes a bundle from its metadata and the names and sizes of the constants in its program;
coreai-core is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty, read_json
from compress.errors import ArtifactError
from compress.plan.shapes import bits_per_weight
from exporters.coreai.bytecode import read_blobs
from exporters.coreai.planning import parts

METADATA, PROGRAM = "metadata.json", "main.mlirb"
KV_BYTES = 2  # states are float16


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle, and what its metadata says.

    Attributes:
        folder: of the bundle.
        name: of the model.
        asset: the folder of the program, ``NAME.aimodel``.
        context: most positions.
        vocab_size: width of the logits.
        facts: what packlight noted: ``version``, ``architecture``, ``parameters``, ``tensors``
            (name, grid and shape of each).
        metadata: the whole ``metadata.json``.
    """

    folder: Path
    name: str
    asset: Path
    context: int
    vocab_size: int
    facts: dict[str, Any]
    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """The bundle of a folder, or of the program in it.

        Raises:
            ArtifactError: not a bundle of packlight's, or damaged.
        """
        folder = path.parent if path.suffix == ".aimodel" else path
        if not (folder / METADATA).is_file():
            raise ArtifactError(
                f"{path.name} is not a Core AI bundle: it has no {METADATA}",
                hint="give the folder with metadata.json and the .aimodel",
            )
        metadata = read_json(folder / METADATA)
        facts = metadata.get("packlight")
        if metadata.get("kind") != "llm" or not isinstance(facts, dict):
            raise ArtifactError(f"{path.name} is not a language model that packlight wrote")
        language, main = metadata["language"], metadata["assets"]["main"]
        asset = folder / main
        if Path(main).name != main or not (asset / PROGRAM).is_file():
            raise ArtifactError(f"{path.name} lacks its program, {main}")
        context, vocab = int(language["max_context_length"]), int(language["vocab_size"])
        return cls(folder, str(metadata["name"]), asset, context, vocab, facts, metadata)

    @property
    def program(self) -> Path:
        """The bytecode, with the weights inside."""
        return self.asset / PROGRAM


def describe(path: Path) -> dict[str, Any]:
    """See ``compress.formats``.

    Raises:
        ArtifactError: not a bundle of packlight's, damaged or truncated.
    """
    bundle = Bundle.open(path)
    kind, facts = str(bundle.metadata.get("compression", "")), bundle.facts
    parameters = int(facts["parameters"])
    nbytes = sum(file.stat().st_size for file in bundle.asset.iterdir() if file.is_file())
    shape = "{} [{}]".format
    config = json_or_empty(bundle.folder / "tokenizer" / "config.json")
    return {
        "format": "coreai",
        "type": kind if kind.startswith("mix-") else None,
        "name": bundle.name,
        "architecture": str(facts["architecture"]),
        "parameters": parameters or None,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": KV_BYTES,
        "context": bundle.context,
        "config": config,
        "metadata": {
            "packlight.version": str(facts.get("version", "")),
            "compression": kind,
            "input_ids": shape("int32", "1, ?"),
            "position_ids": shape("int32", "1, ?"),
            "logits": shape("float16", f"1, ?, {bundle.vocab_size}"),
            "minimum system": "iOS 27, macOS 27",
        },
        "tensors": list_tensors(bundle),
    }


def list_tensors(bundle: Bundle) -> list[dict[str, Any]]:
    """Name, shape, grid and bytes of every stored tensor.

    Raises:
        ArtifactError: a tensor's arrays are not in the program, or of other sizes.
    """
    sizes = {blob.name: blob.raw.size for blob in read_blobs(bundle.program)}
    joined = set(sizes.values())  # equal arrays are stored once, under one of their names
    tensors = []
    for name, grid, shape in bundle.facts["tensors"]:
        arrays = [(part.array_name(name), part) for part in parts(grid, tuple(shape))]
        for array, part in arrays:
            if sizes.get(array, part.nbytes) != part.nbytes or part.nbytes not in joined:
                raise ArtifactError(
                    f"{bundle.asset.name}: {array} has {sizes.get(array, 0)} bytes where "
                    f"{part.nbytes} are needed (truncated, or of another model?)"
                )
        nbytes = sum(part.nbytes for _, part in arrays)
        tensors.append({"name": name, "shape": list(shape), "grid": grid, "bytes": nbytes})
    return tensors
