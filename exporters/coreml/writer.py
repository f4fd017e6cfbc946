"""Writes an ``.mlpackage`` in place; ``weight.bin`` is written one tensor at a time.

    <Name>.mlpackage/
      Manifest.json                                 names the item that is the model
      Data/com.apple.CoreML/model.mlmodel           the program (protobuf)
      Data/com.apple.CoreML/weights/weight.bin      large arrays

coremltools writes to a temporary folder that it copies, with random identifiers in the manifest.
Here nothing is copied or random: two writes give the same bytes.

Three private entry points of coremltools are used, all in ``CoreMLTools``: the class that turns a
program into protobuf, the function around it, and the writer of ``weight.bin``. They are those of
version 9.0, which is pinned.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.checkpoint.scalars import folded_config
from compress.checkpoint.side_files import write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.errors import DiskFullError, RuntimeMissingError
from compress.grids import get_grid
from compress.machine import change_setting, is_own_process
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.app import read_shown
from exporters.coreml.constants import HEADER, VERSION, Blob, Constants, Layout, stored
from exporters.coreml.graph import Decoder
from exporters.coreml.planning import ALIGNMENT, ANE, FLOATS, parts

COREMLTOOLS = "9.0"
SPECIFICATION_VERSION = 9  # iOS 18, macOS 15
AUTHOR = "com.apple.CoreML"
FEATURES = (
    "Token ids, the new ones only",
    "Added to the attention scores; its last size is where the ids end",
    "Logits after each token",
)
MODEL_FILE = "model.mlmodel"
WEIGHTS_FOLDER = "weights"
WEIGHT_FILE = "weight.bin"

MANIFEST_ITEMS = {
    f"{AUTHOR}/{MODEL_FILE}": (MODEL_FILE, "CoreML Model Specification"),
    f"{AUTHOR}/{WEIGHTS_FOLDER}": (WEIGHTS_FOLDER, "CoreML Model Weights"),
}
# Identifiers derived from the paths, instead of random ones.
IDENTIFIERS = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in MANIFEST_ITEMS}
MANIFEST_DOCUMENT = {
    "fileFormatVersion": "1.0.0",
    "itemInfoEntries": {
        IDENTIFIERS[path]: {"author": AUTHOR, "description": text, "name": name, "path": path}
        for path, (name, text) in MANIFEST_ITEMS.items()
    },
    "rootModelIdentifier": IDENTIFIERS[f"{AUTHOR}/{MODEL_FILE}"],
}
MANIFEST = json.dumps(MANIFEST_DOCUMENT, indent=4, sort_keys=True) + "\n"  # Manifest.json

# Filters of warnings, and coremltools' stack of blocks under construction, are shared by all
# threads.
ONE_AT_A_TIME = threading.Lock()


class Writer:
    """See ``compress.plan.shapes.Writer``: the package and its side files.

    The program is made first, with the offset of every array; then tensors are written there.

    Raises:
        RuntimeMissingError: coremltools is not installed, or in another version.
    """

    def __new__(cls, plan: Plan, *others: Any) -> Any:
        """The writer of ``exporters.coreml.ane`` for its plans."""
        if plan.settings["preset"] == ANE:
            from exporters.coreml.ane.writer import Writer as AneWriter

            return AneWriter(plan, *others)
        return super().__new__(cls)

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        tools = CoreMLTools()
        self._folder, self._package = folder, folder / f"{plan.model_name}.mlpackage"
        self._model_folder = self._package / "Data" / AUTHOR
        self.file = self._model_folder / WEIGHTS_FOLDER / WEIGHT_FILE
        self.file.parent.mkdir(parents=True, exist_ok=True)
        config, self._layout = weights.config, Layout()
        self._constants = Constants(tools.mb, tools.storage, plan, config)
        self._storage = tools.storage
        with ONE_AT_A_TIME:
            program = build_program(tools, config, plan.settings["context"], self._constants)
            self._model = tools.export(program, self._constants, self._layout, weights)
        add_metadata(self._model, plan, weights)
        if not weights.ledger.cut(self.file):
            self.file.write_bytes(HEADER.pack(len(self._layout.offsets), VERSION))

    def put(self, entry: PlanEntry) -> int:
        """Write the arrays of one tensor at their offsets in ``weight.bin``."""
        pieces = {part.name: part for part in parts(entry.grid, entry.shape)}
        suffix = {key: "" if key == "val" else f"_{key}" for key in pieces}  # of the constant
        if entry.name.startswith("rope."):
            slabs = iter([{"val": self._constants.values(entry.target_name, None)}])
        else:
            slabs = stored(entry, self.weights)
        with self.file.open("r+b", buffering=0) as stream:
            blobs = {
                key: Blob(stream, self._layout.offsets[entry.target_name + suffix[key]], part)
                for key, part in pieces.items()
                if not part.in_graph
            }
            for arrays in slabs if blobs else ():
                for key, blob in blobs.items():
                    values = np.asarray(arrays[key], self._storage[pieces[key].dtype])
                    self._written(blob.append(values))
            return max((blob.close() for blob in blobs.values()), default=ALIGNMENT)

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        plan, config = self.plan, self.weights.config
        with self.file.open("r+b", buffering=0) as stream:  # the zero biases that MIL requires
            for name, offset in self._layout.offsets.items():
                if name.startswith("zeros_"):
                    blob = Blob(stream, offset, self._constants.parts[name])
                    blob.append(self._constants.values(name, None))
        found, expected = (
            self.file.stat().st_size,
            plan.weights_bytes + plan.settings["container_bytes"],
        )
        if not expected - ALIGNMENT < found <= expected:
            raise DiskFullError(
                f"{self.file.name} has {found:,} bytes where the plan makes {expected:,}",
                hint="is the disk full?",
            )
        # Without `deterministic`, protobuf writes maps in the order of a random hash.
        model = self._model.SerializeToString(deterministic=True)
        (self._model_folder / MODEL_FILE).write_bytes(model)
        (self._package / "Manifest.json").write_text(MANIFEST, encoding="utf-8")
        write_side_files(config, self.weights.checkpoint, self._folder)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self._package,
            nbytes=sum(file.stat().st_size for file in self._package.rglob("*") if file.is_file()),
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def writing_memory(plan: Plan) -> int:
    """Bytes of memory: coremltools with its program, and a matrix that cannot be split into slabs
    because it shares one table."""
    matrices = [entry for entry in plan.entries if entry.grid not in FLOATS]
    whole = [8 * math.prod(e.shape) for e in matrices if not get_grid(e.grid).group_rows]
    return (360 << 20) + max([0, *whole])


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the program, built without values, and of its arrays."""
    if plan.settings["preset"] == ANE:
        from exporters.coreml.ane.writer import file_bytes as bytes_of_packages

        return bytes_of_packages(plan, source)
    tools, layout = CoreMLTools(), Layout()
    config = folded_config(source.config, plan.folded)
    constants = Constants(tools.mb, tools.storage, plan, config)
    with ONE_AT_A_TIME:
        program = build_program(tools, config, plan.settings["context"], constants)
        model = tools.export(program, constants, layout)
    add_metadata(model, plan, source)
    return layout.end + int(model.ByteSize()) + len(MANIFEST)


def build_program(
    tools: CoreMLTools, config: DecoderConfig, context: int, constants: Constants
) -> Any:
    """Build the MIL program: one function, ``main``, whose inputs have flexible shapes."""
    mb, ct, types = tools.mb, tools.ct, tools.types
    queries, rows, columns = (ct.RangeDim(1, context, default=1) for _ in range(3))
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    cache = (layers, 1, heads, context, config.head_dim)
    inputs = {
        "inputIds": mb.placeholder((1, queries.symbol), dtype=types.int32),
        "causalMask": mb.placeholder((1, 1, rows.symbol, columns.symbol), dtype=types.fp16),
        "keyCache": mb.state_tensor_placeholder(cache, types.fp16),
        "valueCache": mb.state_tensor_placeholder(cache, types.fp16),
    }
    program = tools.Program()
    with tools.Function(inputs, opset_version=ct.target.iOS18) as function:
        decoder = Decoder(mb, config, context, constants)
        function.set_outputs([decoder.build(*(function.inputs[name] for name in inputs))])
    function.input_types = [
        ct.TensorType("inputIds", shape=ct.Shape((1, queries)), dtype=np.int32),
        ct.TensorType("causalMask", shape=ct.Shape((1, 1, rows, columns)), dtype=np.float16),
    ]
    program.add_function("main", function)
    return program


def add_metadata(model: Any, plan: Plan, weights: Weights | Source) -> None:
    """Set the metadata that Xcode shows, and swift-transformers' keys for the tokenizer: its Hub id
    only where the model has one."""
    config, context = weights.config, plan.settings["context"]
    floating = DecoderConfig.from_hf(weights.checkpoint.config)  # of the unpruned float model
    described = model.description  # of a package with several functions, it has no features itself
    for feature, text in zip((*described.input, *described.output), FEATURES, strict=False):
        feature.shortDescription = text
    details = described.metadata
    details.shortDescription = (
        f"{plan.model_name}, {plan.type_name}, up to {context} positions; "
        "stateful KV cache, for iOS 18 and macOS 15"
    )
    details.versionString = __version__
    shown = read_shown(weights.checkpoint)
    details.author, details.license = shown.author, shown.license
    if shown.description:
        details.shortDescription += f". {shown.description}"
    prefix = "co.huggingface.exporters"
    # swift-transformers asks the Hub for the tokenizer of `name`: a folder's name makes it fail.
    if weights.checkpoint.hub_id:
        details.userDefined[f"{prefix}.name"] = weights.checkpoint.hub_id
    details.userDefined.update(
        {
            f"{prefix}.task": "text-generation",
            f"{prefix}.architecture": config.architecture,
            f"{prefix}.framework": "pytorch",
            f"{prefix}.precision": "float16",
            "packlight.version": __version__,
            "packlight.grid": plan.type_name,
            "packlight.context": str(context),
            "packlight.parameters": str(floating.num_parameters),
            "com.github.apple.coremltools.version": COREMLTOOLS,
        }
    )


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Make imports of these packages fail, unless they are already loaded.

    coremltools imports every installed framework that it could convert from. Nothing is converted
    here, and torch and transformers would take 1.6 CPU seconds and 160 MB of every build. The
    drawback: code that imports torch later cannot convert torch models with coremltools in the same
    process, so this is only for processes that run packlight alone.
    """
    hidden: dict[str, Any] = {name: None for name in packages if name not in sys.modules}
    sys.modules.update(hidden)  # None makes an import fail: docs.python.org, "The module cache"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class CoreMLTools:
    """The imported coremltools, with the private parts that are used here.

    Attributes:
        ct: the package.  mb: the builder.  types: MIL's types.  Program, Function: of pymil.
        storage: MIL dtype name → the builder's numpy dtype for it.
    """

    def __init__(self) -> None:
        # It warns of an untested torch version; nothing is converted from torch here.
        logger = logging.getLogger("coremltools")
        change_setting("coremltools' log", lambda: logger.level, logger.setLevel, logging.ERROR)
        try:
            with ONE_AT_A_TIME, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with absent("torch", "transformers") if is_own_process() else nullcontext():
                    import coremltools
        except ImportError as error:
            raise RuntimeMissingError(
                "writing a Core ML package needs coremltools",
                hint=f"pip install coremltools=={COREMLTOOLS}",
            ) from error
        if coremltools.__version__ != COREMLTOOLS:
            raise RuntimeMissingError(
                f"coremltools {coremltools.__version__} is installed, packlight writes with "
                f"{COREMLTOOLS} (it uses entry points that are not public)",
                hint=f"pip install coremltools=={COREMLTOOLS}",
            )
        from coremltools.converters.mil.backend.mil import helper, load
        from coremltools.converters.mil.mil import Builder, Function, Program, types

        self.ct: Any = coremltools
        # Names of unnamed constants end in a global counter; with its own counter, every
        # program gets the same names.
        self.mb: Any = type("FreshBuilder", (Builder,), {"name_count": defaultdict(int)})
        self.types: Any = types
        self.Function: Any = Function
        self.Program: Any = Program
        self._load, self._helper = load, helper
        self.storage: dict[str, np.dtype[Any]] = {
            "fp16": np.dtype(np.float16),
            "fp32": np.dtype(np.float32),
            "int4": types.np_int4_dtype,
            "int8": np.dtype(np.int8),
            "uint8": np.dtype(np.uint8),
        } | {f"uint{n}": getattr(types, f"np_uint{n}_dtype") for n in (1, 2, 3, 4, 6)}

    def export(
        self,
        program: Any,
        constants: Constants,
        layout: Layout,
        weights: Weights | None = None,
    ) -> Any:
        """Convert the program to a Core ML model (protobuf), with array offsets from ``layout``.

        Small arrays are stored in it; without ``weights`` they are zeros.

        coremltools' passes are not run: one of them would merge all placeholders of equal shape,
        and the program is float16 already.
        """
        load, helper = self._load, self._helper

        class PlaceholderExporter(load.MILProtoExporter):  # type: ignore[misc, name-defined]
            def get_milproto_value(self, var: Any) -> Any:
                name = var.op.name
                part = constants.parts.get(name)
                if part is None:
                    return super().get_milproto_value(var)
                if part.in_graph:
                    return helper.create_tensor_value(constants.values(name, weights))
                return helper.create_file_value_tensor(
                    file_name=f"@model_path/{WEIGHTS_FOLDER}/{WEIGHT_FILE}",
                    offset=layout.add(name, part),
                    dim=part.shape,
                    data_type=helper.types_to_proto_primitive(var.dtype),
                )

        proto = PlaceholderExporter(program, "", SPECIFICATION_VERSION).export()
        described = load.CoreMLProtoExporter(
            program,
            proto,
            None,
            None,
            classifier_config=None,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=SPECIFICATION_VERSION,
        )
        return described.export(SPECIFICATION_VERSION)
