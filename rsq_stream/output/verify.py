"""Check an output folder: every file, every tensor, every bit.

The seal names the manifest, the manifest every other file; so one flipped bit
anywhere is found, and so are files and tensors that are missing, doubled, or in
full precision where codes belong.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rsq_stream.algorithm.grids import GRIDS
from rsq_stream.algorithm.importance import STRATEGIES
from rsq_stream.checkpoint.files import FolderFiles
from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.formats.base import Format
from rsq_stream.checkpoint.manifest import MANIFEST, SEAL, manifest_bytes, seal_of
from rsq_stream.checkpoint.output_tensors import output_tensors
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import Source
from rsq_stream.checkpoint.source_identity import require_source
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import CheckpointError, OutputError, RsqError
from rsq_stream.model.architecture import read_architecture
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.storage import atomic


@dataclass(kw_only=True)
class Verification:
    """What was found; ``problems`` is empty for a sound folder."""

    files: int = 0
    bytes: int = 0
    tensors: int = 0
    problems: list[str] = field(default_factory=list)
    weight_errors: dict[str, float] = field(default_factory=dict)
    """With ``against``: |W - Q|^2 / |W|^2 per linear, W as the plan rotates it."""


def verify(folder: Path, against: Checkpoint | None = None) -> Verification:
    """Check a finished output; ``against`` its source also measures each linear.

    Raises
    ------
    OutputError
        There is no finished output here at all.
    CheckpointError
        ``against`` is not the source that the output was made from.
    """
    found = Verification()
    if not (folder / SEAL).is_file():
        raise OutputError(
            f"{folder}: no {SEAL}; this is no finished output of rsq-stream"
        )
    manifest = _manifest(folder, found)
    if manifest is None:
        return found
    for problem in _check_files(folder, manifest, found):
        found.problems.append(problem)
    if found.problems:
        return found  # what is damaged is not worth decoding
    try:
        plan = QuantizationPlan.from_fields(manifest["plan"])
        GRIDS[plan.grid].require_plan(plan)
        stored = FORMATS[plan.output_format]
        STRATEGIES[plan.importance].require_options(plan, plan.sequence_length)
        checkpoint = Checkpoint(FolderFiles(folder))
    except (RsqError, TypeError) as error:
        found.problems.append(f"{folder}: {error}")
        return found
    found.problems += _check_tensors(checkpoint, plan, stored, found)
    if against is not None and not found.problems:
        if against.headers_sha256 != plan.source_sha256:
            raise CheckpointError(
                f"{against.files.where}: is not the source of {folder}; its headers'"
                f" hash is {against.headers_sha256}, the plan has {plan.source_sha256}"
            )
        require_source(against, manifest["source"])
        found.weight_errors = dict(_weight_errors(checkpoint, against, plan))
    return found


def _manifest(folder: Path, found: Verification) -> dict[str, Any] | None:
    """Read the manifest, if it is what the seal says."""
    path = folder / MANIFEST
    try:
        content = manifest_bytes(path)
    except (OSError, OutputError):
        found.problems.append(f"{path}: missing or larger than any manifest")
        return None
    seal = seal_of(content)
    if (folder / SEAL).read_bytes() != seal:
        found.problems.append(
            f"{folder}: {SEAL} does not match {MANIFEST}; one of the two is damaged"
        )
        return None
    found.files += 2
    found.bytes += len(content) + len(seal)
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def _check_files(
    folder: Path, manifest: dict[str, Any], found: Verification
) -> Iterator[str]:
    listed = manifest["files"]
    here = {path.name for path in folder.iterdir()}
    for name in sorted(here - listed.keys() - {MANIFEST, SEAL}):
        yield f"{folder / name}: is not part of this output"
    for name, wanted in listed.items():
        path = folder / name
        if name not in here:
            yield f"{path}: is missing"
            continue
        size = path.stat().st_size
        if size != wanted["bytes"]:
            yield f"{path}: has {size} bytes, {wanted['bytes']} were written"
        elif atomic.sha256_of(path) != wanted["sha256"]:
            yield f"{path}: its content is not what was written (sha256 differs)"
        found.files += 1
        found.bytes += size


def _check_tensors(
    checkpoint: Checkpoint, plan: QuantizationPlan, stored: Format, found: Verification
) -> list[str]:
    """Compare the tensors that are there with those the plan announces."""
    where = checkpoint.files.where
    architecture = read_architecture(checkpoint.config, where)
    there = checkpoint.tensors
    found.tensors = len(there)

    def dtype_of(name: str) -> torch.dtype:
        stem = name.removesuffix(".weight")
        entry = there.get(name) or there.get(stored.typed_tensor(stem))
        return entry.dtype if entry else torch.float32

    announced = {
        tensor.name: tensor for tensor in output_tensors(architecture, plan, dtype_of)
    }
    problems = [
        f"{where}: {name} is missing" for name in announced.keys() - there.keys()
    ]
    for name, entry in there.items():
        wanted = announced.get(name)
        if wanted is None:
            problems.append(f"{where}/{entry.shard}: {name} does not belong here")
        elif (wanted.dtype, wanted.shape) != (entry.dtype, entry.shape):
            problems.append(
                f"{where}/{entry.shard}: {name} is {entry.dtype} {list(entry.shape)},"
                f" not {wanted.dtype} {list(wanted.shape)}"
            )
    return sorted(problems)


def _weight_errors(
    checkpoint: Checkpoint, against: Checkpoint, plan: QuantizationPlan
) -> Iterator[tuple[str, float]]:
    """Decode each linear and give its distance from the (rotated) source."""
    architecture = read_architecture(against.config, against.files.where)
    source = Source(
        against,
        architecture=architecture,
        plan=plan,
        device=torch.device("cpu"),
    )
    stored = FORMATS[plan.output_format]
    for index in range(architecture.blocks):
        tensors = source.block(index)
        for linear in architecture.linears(index):
            weight_OI = tensors[f"{linear}.weight"]
            name = block_prefix(index) + linear
            scheme = plan.scheme(name, weight_OI.shape[1])
            if scheme is None:
                continue
            decoded_OI = stored.decode(checkpoint.read, name, scheme)
            lost = (weight_OI - decoded_OI).square().sum(dtype=torch.float64)
            whole = weight_OI.square().sum(dtype=torch.float64)
            yield name, float(lost / whole) if float(whole) > 0 else 0.0
