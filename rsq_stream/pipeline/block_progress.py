"""How far a block is: stages are made durable one by one, and picked up again.

A killed run repeats at most the stage it was in. What a later stage needs of the
earlier ones is on disk when their rows are committed: codes in the partial shard,
the tokens' weights after the first stage, h after the stage that writes it.
"""

import dataclasses

from safetensors.torch import load, save
from torch import Tensor

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.errors import DamagedError
from rsq_stream.events import LinearRecord
from rsq_stream.model.block import Block
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.pipeline.run import QuantizationRun
from rsq_stream.pipeline.token_importance import TokenWeights
from rsq_stream.storage import atomic
from rsq_stream.storage.checksum import checksum
from rsq_stream.storage.journal import Progress

TOKEN_WEIGHTS = "token-weights.safetensors"


def commit_stage(
    run: QuantizationRun,
    index: int,
    stage: int,
    *,
    records: list[LinearRecord],
    token_weights: TokenWeights,
) -> None:
    """Make a stage's bytes durable, then journal it."""
    run.codes.flush()
    chunks = {}
    if stage == 0:
        chunks[TOKEN_WEIGHTS] = {index: write_token_weights(run, token_weights)}
    if run.job.architecture.stages(index)[stage].writes:
        for slots in run.calibrated.slots.of_block(index):
            slots.h.flush(durable=True)
            chunks[slots.h.folder.name] = slots.h.checksums
    run.output.sync()
    run.journal.finish_stage(
        index,
        stage,
        Progress(
            chunks=chunks,
            linears={record.name: dataclasses.asdict(record) for record in records},
            tensors=run.output.new_checksums(),
            source=run.source.unjournalled(),
        ),
    )


def write_token_weights(run: QuantizationRun, token_weights: TokenWeights) -> int:
    """Keep the tokens' importance for later stages; return the file's checksum."""
    content = save({"weight": token_weights.weight_BT.to("cpu")})
    atomic.write_file(run.job.options.work_dir / TOKEN_WEIGHTS, content)
    return checksum(content)


def replace_solved(run: QuantizationRun, index: int, block: Block, done: int) -> None:
    """Put the quantized weights of its first ``done`` stages into a block.

    Raises
    ------
    DamagedError
        A tensor in the output is not what was written.
    """
    stored = FORMATS[run.job.plan.output_format]
    for stage in run.job.architecture.stages(index)[:done]:
        for linear in stage.linears:
            name = block_prefix(index) + linear.name
            scheme = run.job.plan.scheme(name, block.weight(linear.name).shape[1])
            if scheme is not None:
                decoded_OI = stored.decode(run.output.read, name, scheme)
                block.replace_weight(linear.name, decoded_OI)


def restore(run: QuantizationRun, index: int, block: Block, done: int) -> Tensor | None:
    """Take up what the first ``done`` stages of a block left in the work folder.

    Returns the tokens' weights, None if no stage is done.

    Raises
    ------
    DamagedError
        The tokens' weights are not what was written.
    """
    if done == 0:
        return None
    stages = run.job.architecture.stages(index)[:done]
    if any(stage.writes for stage in stages):
        for slots in run.calibrated.slots.of_block(index):
            slots.h.checksums = run.journal.chunks(slots.h.folder.name)
    path = run.job.options.work_dir / TOKEN_WEIGHTS
    content = path.read_bytes() if path.is_file() else b""
    if run.journal.chunks(TOKEN_WEIGHTS).get(index) != checksum(content):
        raise DamagedError(f"{path}: is damaged or missing", path.name)
    return load(content)["weight"].to(block.device)
