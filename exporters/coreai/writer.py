"""Writes the bundle: the program with its weights, its metadata, and the tokenizer's folder.

Tensors are packed into a file beside the bundle, some rows at a time. After the last one the
program is made over that file's pages and saved, and the file is removed: memory holds no weights,
the disk for a moment twice as many.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.checkpoint.scalars import folded_config
from compress.checkpoint.side_files import write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import read_json, write_json
from compress.decoder.tokenizer_facts import TokenizerFacts, parse
from compress.errors import DiskFullError
from compress.files import scratch_folder
from compress.grids import get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.app import read_shown
from exporters.coreai.constants import Constants, file_bytes_of, layout, write_entry
from exporters.coreai.graph import build
from exporters.coreai.inspection import METADATA, PROGRAM, Bundle, list_tensors
from exporters.coreai.library import COREAI, CoreAI
from exporters.coreai.planning import FLOATS

HASH, TOKENIZER = "main.hash", "tokenizer"
BLOCK = 1 << 24  # bytes read at a time


class Writer:
    """See ``compress.plan.shapes.Writer``; the artifact's path is the bundle's folder.

    Raises:
        RuntimeMissingError: coreai-core is not installed, or in another version.
    """

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written, self._folder = plan, weights, written, folder
        self._library, self._pieces = CoreAI(), layout(plan.entries)
        self.file = folder / "packed.partial"
        if not weights.ledger.cut(self.file):
            self.file.write_bytes(b"")

    def put(self, entry: PlanEntry) -> int:
        """Write the arrays of one tensor at their offsets."""
        pieces = self._pieces[entry.target_name]
        with self.file.open("r+b", buffering=0) as stream:
            for nbytes in write_entry(stream, entry, pieces, self.weights):
                self._written(nbytes)
        return max(piece.offset + piece.part.nbytes for piece in pieces.values())

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        plan, config, checkpoint = self.plan, self.weights.config, self.weights.checkpoint
        asset = self._folder / f"{plan.model_name}.aimodel"
        asset.mkdir(exist_ok=True)
        found, expected = self.file.stat().st_size, file_bytes_of(plan.entries)
        if found != expected:
            raise DiskFullError(
                f"{self.file.name} has {found:,} bytes where the plan makes {expected:,}",
                hint="is the disk full?",
            )
        if shutil.disk_usage(asset).free < expected:
            raise DiskFullError(f"{expected:,} more bytes are needed to write {PROGRAM}")
        save_program(self._library, plan, config, self.file, asset / PROGRAM)
        self.file.unlink()
        (asset / HASH).write_bytes(digest_of(asset / PROGRAM))
        (asset / METADATA).write_text(asset_metadata(plan, self.weights), encoding="utf-8")
        write_json(self._folder / METADATA, bundle_metadata(plan, self.weights))
        list_tensors(Bundle.open(self._folder))  # is every array there?
        tokenizer = self._folder / TOKENIZER
        tokenizer.mkdir(exist_ok=True)
        write_side_files(config, checkpoint, tokenizer)
        if checkpoint.has_tokenizer:
            add_stop_tokens(tokenizer / "tokenizer_config.json", config, checkpoint.tokenizer_facts)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self._folder,
            nbytes=sum(file.stat().st_size for file in asset.iterdir()),
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def save_program(
    library: CoreAI, plan: Plan, config: DecoderConfig, packed: Path, path: Path
) -> None:
    """Make the program over a file of packed arrays, and write it."""
    data = np.memmap(packed, np.uint8, mode="r")
    module = build(
        library,
        config,
        plan.settings["context"],
        lambda: Constants(library, plan, config, data),
    )
    library.save(module, path)


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.digest()


def asset_metadata(plan: Plan, weights: Weights | Source) -> str:
    """``metadata.json`` of the program, as coreai-core writes it, without a date."""
    shown = read_shown(weights.checkpoint)
    own = f"{plan.model_name}, {plan.type_name}, up to {plan.max_context} positions"
    document = {
        "assetVersion": "2.0",
        "author": shown.author,
        "creatorDefinedMetadata": {"packlight.version": __version__},
        "description": shown.description or own,
        "license": shown.license,
        "producer": f"coreai-core {COREAI}",
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def bundle_metadata(plan: Plan, weights: Weights | Source) -> dict[str, Any]:
    """``metadata.json`` of the bundle: what Apple's runner reads, and under ``packlight`` what
    ``inspect`` reads."""
    config, checkpoint = weights.config, weights.checkpoint
    floating = DecoderConfig.from_hf(checkpoint.config)  # of the unpruned float model
    hub_id = checkpoint.hub_id
    return {
        "metadata_version": "0.2",
        "kind": "llm",
        "name": plan.model_name,
        "assets": {"main": f"{plan.model_name}.aimodel"},
        "language": {
            "tokenizer": hub_id or plan.model_name,
            "vocab_size": config.vocab_size,
            "max_context_length": plan.settings["context"],
            "embedded_tokenizer": True,
            "function_map": {"main": ["main"]},
        },
        "source": {"model_definition": "torch", **({"hf_model_id": hub_id} if hub_id else {})},
        "compression": plan.type_name,
        "packlight": {
            "version": __version__,
            "architecture": config.architecture,
            "parameters": floating.num_parameters,
            "tensors": [[e.target_name, e.grid, list(e.shape)] for e in plan.entries],
        },
    }


def add_stop_tokens(file: Path, config: DecoderConfig, tokenizer: TokenizerFacts) -> None:
    """Name the model's stop tokens where Apple's runner looks for them.

    It stops at ``eos_token`` and at every one of ``additional_special_tokens``
    (``LanguageConfig.additionalStopTokenIds``), and reads no ``generation_config.json``. All
    special tokens are in ``tokenizer.json``, too.
    """
    texts = {index: text for text, index in parse(tokenizer.text).ids.items()}
    stops = [texts[index] for index in config.eos_token_ids if index in texts]
    others = [text for text in stops if text != tokenizer.special.get("eos_token")]
    settings = read_json(file) | {"additional_special_tokens": others}
    write_json(file, settings, sort_keys=True)


def writing_memory(plan: Plan) -> int:
    """Bytes of memory: coreai-core with its program, and a matrix that cannot be split into slabs
    because it shares one table."""
    matrices = [entry for entry in plan.entries if entry.grid not in FLOATS]
    whole = [8 * math.prod(e.shape) for e in matrices if not get_grid(e.grid).group_rows]
    return (250 << 20) + max([0, *whole])


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the program, made over a sparse file in which only the
    first bytes of each array are not zero: Apple's rewrite joins constants that are equal."""
    library, config = CoreAI(), folded_config(source.config, plan.folded)
    with scratch_folder() as work:
        packed, program = work / "packed", work / PROGRAM
        with packed.open("wb") as stream:
            stream.truncate(file_bytes_of(plan.entries))
            pieces = [piece for found in layout(plan.entries).values() for piece in found.values()]
            for number, piece in enumerate(pieces):
                stream.seek(piece.offset)
                stream.write(number.to_bytes(8, "little")[: piece.part.nbytes])
        save_program(library, plan, config, packed, program)
        nbytes = program.stat().st_size
    return nbytes + hashlib.sha256().digest_size + len(asset_metadata(plan, source).encode())
