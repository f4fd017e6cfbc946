"""What an app needs beside an artifact for Apple's systems, and what Xcode shows of one.

    model.json          context, stop ids, chat template, memory, sizes, inputs, states, outputs
    NAME.entitlements   what the app must ask for to hold the model
    parity.json         text and logits that the device must reproduce
    LICENSE…            the checkpoint's own texts
    Swift/              packages that load the folder, measure it and check parity.json

The files are made after verification, because the logits are those that it computed.
"""

from __future__ import annotations

import json
import plistlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config_json import write_json
from compress.decoder.footprint import embedding_bytes, footprint
from compress.plan.job import Job, read_card
from compress.plan.shapes import Artifact

__all__ = ["Interface", "Shown", "read_shown", "write_app_files"]

VERSION = 1  # of model.json and parity.json
LONGEST = 500  # characters of a text of the card that Xcode shows
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
ADDRESSES = 4 << 30  # bytes that fit in an app's address space without an entitlement

MEMORY = "com.apple.developer.kernel.increased-memory-limit"
ADDRESS_SPACE = "com.apple.developer.kernel.extended-virtual-addressing"


@dataclass(frozen=True)
class Shown:
    """Texts of the checkpoint's card that Xcode shows; empty where the card has none."""

    author: str
    license: str
    description: str


def read_shown(checkpoint: Checkpoint) -> Shown:
    """Author, license and description of a model, from the YAML head of its card.

    Without an author, the owner of the model's Hub repository. The card is untrusted: values that
    are not short printable texts are left out.
    """
    shown: dict[str, str] = {}
    for key, value in read_card(checkpoint).items():
        parts: list[Any] = value if isinstance(value, list) else [value]
        if all(isinstance(part, str) and part.isprintable() for part in parts):
            shown[key] = ", ".join(parts)[:LONGEST]
    name, link = shown.get("license", ""), shown.get("license_link")
    if name == "other":
        name = shown.get("license_name") or name
    authors = filter(None, map(shown.get, ("author", "authors", "model_creator")))
    texts = filter(None, map(shown.get, ("description", "summary")))
    return Shown(
        author=next(authors, checkpoint.hub_id.partition("/")[0]),
        license=f"{name} ({link})" if name and link else name,
        description=next(texts, ""),
    )


@dataclass(frozen=True)
class Interface:
    """How an app calls an artifact.

    Attributes:
        inputs, states, outputs: name, ``dtype`` and ``shape`` of each; a text such as ``1...2048``
            is a flexible size.
        deployment: system → its oldest version.
        context: positions of the KV cache.
        swift: whether ``Swift/`` can run it.
        package: what an app opens, in the folder with all the files; None: the artifact.
    """

    inputs: Sequence[Mapping[str, Any]]
    states: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    deployment: Mapping[str, str]
    context: int
    swift: bool = True
    package: Path | None = None


def write_app_files(
    artifact: Artifact, job: Job, interface: Interface, parity: Mapping[str, Any] | None
) -> None:
    """Write all of it into the artifact's folder.

    Args:
        artifact: written, with its tokenizer beside it.
        job: of the build.
        interface: of the artifact.
        parity: ids and logits by the runtime that verified it; None: it was not run.
    """
    package, context = interface.package or artifact.path, interface.context
    folder, plan, checkpoint = package.parent, artifact.plan, job.checkpoint
    embedding = embedding_bytes(job.shape, plan.entries)
    need = footprint(
        job.shape,
        plan.weights_bytes,
        embedding,
        context,
        plan.kv_bytes_per_value,
        outside=plan.weights_outside,
    )
    rights = [MEMORY, *([ADDRESS_SPACE] if need.total > ADDRESSES else ())]
    templates = checkpoint.tokenizer_facts.chat_templates if checkpoint.has_tokenizer else {}
    described = {
        "format_version": VERSION,
        "made_by": f"packlight {__version__}",
        "name": plan.model_name,
        "hub_id": checkpoint.hub_id or None,
        "license": read_shown(checkpoint).license or None,
        "format": artifact.format,
        "package": package.name,
        "grid": artifact.type_name,
        "bytes": artifact.nbytes,
        "parameters": job.shape.num_parameters,
        "context": context,
        "vocab_size": job.shape.vocab_size,
        "bos_id": job.shape.bos_token_id,
        "stop_ids": list(job.shape.eos_token_ids),
        "chat_template": templates.get("default"),
        "memory": {
            "weights_bytes": need.weights,
            "kv_cache_bytes": need.kv_cache,
            "activation_bytes": need.activations,
            "total_bytes": need.total,
            **({"weights_outside": True} if need.outside else {}),
            "estimated": True,
        },
        "inputs": list(interface.inputs),
        "states": list(interface.states),
        "outputs": list(interface.outputs),
        "deployment": dict(interface.deployment),
        "entitlements": rights,
    }
    write_json(folder / "model.json", described)
    with (folder / f"{plan.model_name}.entitlements").open("wb") as stream:
        plistlib.dump(dict.fromkeys(rights, True), stream)
    for pattern in LICENSES:
        for terms in sorted(checkpoint.path.glob(pattern)):
            if terms.is_file():
                shutil.copyfile(terms, folder / terms.name)
    samples = checkpoint.tokenizer_facts.samples if checkpoint.has_tokenizer else {}
    document = parity_document(samples, parity)
    text = json.dumps(document, ensure_ascii=False)
    (folder / "parity.json").write_text(f"{text}\n", encoding="utf-8")
    if interface.swift:
        shutil.copytree(Path(__file__).with_name("swift"), folder / "Swift", dirs_exist_ok=True)


def parity_document(
    samples: Mapping[str, Sequence[int]], parity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """``parity.json``: logits of the runtime here, and token ids of texts.

    Args:
        samples: text → its ids; empty without a tokenizer.
        parity: of ``compress.verify.parity``.
    """
    document: dict[str, Any] = {"format_version": VERSION, "texts": []}
    if parity is None:
        document |= {
            "logits": None,
            "why_no_logits": "no runtime gave logits: --no-verify, or see report.json",
        }
    else:
        document["logits"] = dict(parity)
    document["texts"] = [{"text": text, "ids": ids} for text, ids in samples.items()]
    return document
