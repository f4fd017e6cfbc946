"""An ``.mlpackage``, written in place: ``weight.bin`` grows inside it, one tensor at a time.

    <Name>.mlpackage/
      Manifest.json                                 which item is the model
      Data/com.apple.CoreML/model.mlmodel           the program (protobuf)
      Data/com.apple.CoreML/weights/weight.bin      everything large

coremltools does this through a temporary folder that it copies, with random identifiers in the
manifest. Here nothing is copied and nothing is random: two writes give the same bytes.

Three private entry points of coremltools are used, all in ``CoreMLTools``: the class that turns
a program into protobuf, the function around it, and the writer of ``weight.bin``. They are those
of version 9.0, which is pinned.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.checkpoint.side_files import write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.errors import DiskFullError, RuntimeMissingError
from compress.grids import Float32, Grid, Quantized
from compress.plan.shapes import Artifact, Plan, Progress, Weights
from exporters.coreml.constants import HollowConstants, LazyConstants
from exporters.coreml.graph import Decoder
from exporters.coreml.planning import IMMEDIATE
from exporters.coreml.weight_file import BlobFile, Blobs, CountedBlobs

COREMLTOOLS = "9.0"
SPECIFICATION_VERSION = 9  # iOS 18, macOS 15
AUTHOR = "com.apple.CoreML"
MODEL_FILE = "model.mlmodel"
WEIGHTS_FOLDER = "weights"
WEIGHT_FILE = "weight.bin"


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """Write the package and its side files; see ``compress.plan.shapes.Exporter.write``.

    Raises:
        RuntimeMissingError: coremltools is not installed, or another version is.
        DiskFullError: no room left.
    """
    tools = CoreMLTools()
    package = folder / f"{plan.model_name}.mlpackage"
    model_folder = package / "Data" / AUTHOR
    weight_file = model_folder / WEIGHTS_FOLDER / WEIGHT_FILE
    weight_file.parent.mkdir(parents=True, exist_ok=True)
    config = weights.config
    constants = LazyConstants(tools.mb, tools.storage, plan, weights)
    blobs = BlobFile(weight_file, weights, counted(plan, progress))
    model = make_model(tools, plan, weights, constants, blobs)
    _check_weight_file(plan, weight_file)
    # Without `deterministic`, protobuf's maps come out in the order of a random hash.
    (model_folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
    (package / "Manifest.json").write_text(manifest(), encoding="utf-8")
    write_side_files(config, weights.checkpoint, folder)
    return Artifact(
        format="coreml",
        type_name=plan.type_name,
        path=package,
        nbytes=sum(file.stat().st_size for file in package.rglob("*") if file.is_file()),
        weights_bytes=plan.weights_bytes,
        kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
        plan=plan,
        notes=plan.notes,
    )


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.plan.shapes.Exporter.file_bytes``: the program as it will be, its arrays counted."""
    tools = CoreMLTools()
    weights = Weights(source, no_weights)
    constants = HollowConstants(tools.mb, tools.storage, plan, weights)
    blobs = CountedBlobs()
    model = make_model(tools, plan, weights, constants, blobs)
    return blobs.end + int(model.ByteSize()) + len(manifest())


def no_weights(weight: Float32, grid: Grid, name: str) -> Quantized:
    """The solver of ``file_bytes``, which asks for none."""
    raise AssertionError(name)


def make_model(
    tools: CoreMLTools, plan: Plan, weights: Weights, constants: LazyConstants, blobs: Blobs
) -> Any:
    """The model (protobuf), its large arrays handed to ``blobs``."""
    program = build_program(tools, weights.config, plan.settings["context"], constants)
    model = tools.export(program, constants, blobs)
    add_metadata(model, plan, weights)
    return model


def counted(plan: Plan, progress: Progress) -> Callable[[int], None]:
    """``written(nbytes)``, which adds up and tells ``progress``."""
    done = 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, plan.weights_bytes), plan.weights_bytes)

    return written


def build_program(
    tools: CoreMLTools, config: DecoderConfig, context: int, constants: LazyConstants
) -> Any:
    """The MIL program: one function, ``main``, whose inputs have flexible shapes."""
    mb, ct, types = tools.mb, tools.ct, tools.types
    queries, rows, columns = (ct.RangeDim(1, context, default=1) for _ in range(3))
    cache = Decoder.cache_shape(config, context)
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


def add_metadata(model: Any, plan: Plan, weights: Weights) -> None:
    """What Xcode shows, and the keys by which swift-transformers finds the tokenizer."""
    config, context = weights.config, plan.settings["context"]
    floating = DecoderConfig.from_hf(weights.checkpoint.config)  # what a size is told against
    described = model.description
    for feature, text in (
        (described.input[0], "Token ids, the new ones only"),
        (described.input[1], "Added to the attention scores; its last size is where the ids end"),
        (described.output[0], "Logits after each token"),
    ):
        feature.shortDescription = text
    details = described.metadata
    details.shortDescription = (
        f"{plan.model_name}, {plan.type_name}, up to {context} positions; "
        "stateful KV cache, for iOS 18 and macOS 15"
    )
    details.versionString = __version__
    prefix = "co.huggingface.exporters"
    details.userDefined.update(
        {
            f"{prefix}.name": weights.checkpoint.source,
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


def manifest() -> str:
    """``Manifest.json`` with identifiers made from the paths, instead of random ones."""
    items = {
        f"{AUTHOR}/{MODEL_FILE}": (MODEL_FILE, "CoreML Model Specification"),
        f"{AUTHOR}/{WEIGHTS_FOLDER}": (WEIGHTS_FOLDER, "CoreML Model Weights"),
    }
    names = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in items}
    document = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            names[path]: {"author": AUTHOR, "description": text, "name": name, "path": path}
            for path, (name, text) in items.items()
        },
        "rootModelIdentifier": names[f"{AUTHOR}/{MODEL_FILE}"],
    }
    return json.dumps(document, indent=4, sort_keys=True) + "\n"


def _check_weight_file(plan: Plan, file: Path) -> None:
    """The plan knows the size."""
    expected = plan.weights_bytes + plan.settings["container_bytes"]
    found = file.stat().st_size
    if not expected - 64 < found <= expected:
        raise DiskFullError(
            f"{file.name} has {found:,} bytes where the plan makes {expected:,}",
            hint="is the disk full?",
        )


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Whoever imports these meanwhile is told that they are not installed, unless they are loaded.

    coremltools imports every framework that it could convert from, if it finds it. Nothing is
    converted here, and torch and transformers would be 1.6 CPU seconds and 160 MB of every build.
    The price: a script that writes a package with packlight, and imports torch only then, cannot
    convert torch models by coremltools in the same process.
    """
    hidden: dict[str, Any] = {name: None for name in packages if name not in sys.modules}
    sys.modules.update(hidden)  # None makes an import fail: docs.python.org, "The module cache"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class CoreMLTools:
    """coremltools, imported, with the private parts that are used here.

    Attributes:
        ct: the package.  mb: the builder.  types: MIL's types.  Program, Function: of pymil.
        storage: MIL dtype name → numpy dtype by which the builder knows it.
    """

    def __init__(self) -> None:
        # It warns of a torch that it was not tested with; nothing of torch is converted here.
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with absent("torch", "transformers"):
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
        # Names of unnamed constants end in a number that the class counts up for ever; with a
        # count of its own, every program gets the same names.
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

    def export(self, program: Any, constants: LazyConstants, blobs: Blobs) -> Any:
        """The program as a Core ML model (protobuf); its arrays go to ``blobs``.

        coremltools' own passes are not run: one of them would merge all placeholders of equal
        shape, and the program is float16 already.
        """
        load, helper = self._load, self._helper

        class StreamingExporter(load.MILProtoExporter):  # type: ignore[misc, name-defined]
            def get_milproto_value(self, var: Any) -> Any:
                name = var.op.name
                if not constants.is_lazy(name):
                    return super().get_milproto_value(var)
                part, slabs = constants.part(name), constants.fill(name)
                if math.prod(part.shape) < IMMEDIATE:
                    return helper.create_tensor_value(next(slabs).reshape(part.shape))
                offset = blobs.find(name)
                if offset is None:
                    offset = blobs.append(name, part, slabs, constants.weight_of(name))
                return helper.create_file_value_tensor(
                    file_name=f"@model_path/{WEIGHTS_FOLDER}/{WEIGHT_FILE}",
                    offset=offset,
                    dim=part.shape,
                    data_type=helper.types_to_proto_primitive(var.dtype),
                )

        proto = StreamingExporter(program, "", SPECIFICATION_VERSION).export()
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
