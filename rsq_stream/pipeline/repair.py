"""Make damaged bytes again from the last good state, or refuse.

====================================  ============================================
what                                  made again from
====================================  ============================================
input of block 0                      the calibration windows and the embedding
input of block n                      the input of block n-1, which lives until n
                                      writes its outputs, and the codes of n-1
h                                     the input, and the codes of q, k, v, o
                                      (of the full-precision stream: the source's
                                      weights in place of the codes)
token weights                         the input, and the source's q and k
codes of the unfinished block         their stage and those after it, solved again
embedding, head, norms, biases        the source
codes of finished blocks              the source for ``rtn``, else nothing: refused
====================================  ============================================

What comes out is compared with the checksums of what was lost.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from rsq_stream.errors import DamagedError
from rsq_stream.events import Notice
from rsq_stream.model.tensor_names import block_of, block_prefix
from rsq_stream.pipeline.block_progress import TOKEN_WEIGHTS, write_token_weights
from rsq_stream.pipeline.block_setup import embed_windows, open_block
from rsq_stream.pipeline.block_solver import BlockSolver, round_block
from rsq_stream.pipeline.embedding_and_head import EmbeddingAndHead
from rsq_stream.pipeline.run import Calibration, QuantizationRun
from rsq_stream.storage.activation_cache import Slot

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Repairs:
    """Make again what a run finds damaged; the same thing once a block."""

    def __init__(self, run: QuantizationRun) -> None:
        self._run = run
        self._tried: set[tuple[int, str]] = set()

    def repairing(
        self,
        work: Callable[Concatenate[QuantizationRun, Arguments], Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Do a piece of the run's work, again after each repair of what it needs.

        Raises
        ------
        DamagedError
            Something is damaged, and nothing is left to make it from.
        """
        while True:
            try:
                return work(self._run, *arguments, **options)
            except DamagedError as damage:
                self._repair(self._run.finished_blocks, damage)

    def _repair(self, block: int, damage: DamagedError) -> None:
        """Make again what is damaged, while ``block`` is the one in work."""
        if (block, damage.part) in self._tried:
            raise damage
        self._tried.add((block, damage.part))
        try:
            made_from = _made_again(self._run, block, damage)
        except DamagedError as other:
            raise damage from other
        text = f"{damage.what}; made again from {made_from}"
        self._run.passes.listener(Notice(text=text))


def _made_again(run: QuantizationRun, block: int, damage: DamagedError) -> str:
    """Make the damaged part again; return what it was made from."""
    shared, part = run.calibration, damage.part
    if shared is None:
        return _tensor(run, block, damage)
    for stream, slots in enumerate(shared.slots.of_block(block)):
        if part == slots.x.folder.name:
            return _input(run, shared, block, stream, damage=damage)
        if part == slots.h.folder.name:
            solver = _reopened(run, shared, block, run.journal.stages(block))
            solver.streams[stream].replay_h(run.passes, block)
            _require_same(run, slots.h, damage)
            return "the block's input"
    if part == TOKEN_WEIGHTS:
        solver = _reopened(run, shared, block, 0)
        written = write_token_weights(run, solver.statistics.weigh())
        if written != run.journal.chunks(TOKEN_WEIGHTS).get(block):
            raise damage
        return "the block's input"
    return _tensor(run, block, damage)


def _input(
    run: QuantizationRun,
    shared: Calibration,
    block: int,
    stream: int,
    *,
    damage: DamagedError,
) -> str:
    """Make a stream's input of a block again: what the block before put out."""
    x = shared.slots.inputs_of(block)[stream]
    if block == 0:
        if run.job.windows is None:
            raise damage
        embed_windows(run, run.job.windows)
    else:
        stages = len(run.job.architecture.stages(block - 1))
        solver = _reopened(run, shared, block - 1, stages)
        solver.streams[stream].replay_h(run.passes, block - 1)
        solver.streams[stream].advance(run.passes, block - 1)
    _require_same(run, x, damage)
    return f"the input of block {block - 1}" if block else "the calibration windows"


def _reopened(
    run: QuantizationRun, shared: Calibration, block: int, stages: int
) -> BlockSolver:
    """Open a block with so many stages done, and its inputs known."""
    for slot in shared.slots.inputs_of(block):
        slot.checksums = slot.checksums or run.journal.chunks(slot.folder.name)
    return open_block(run, block, run.source.block(block), stages)


def _require_same(run: QuantizationRun, slot: Slot, damage: DamagedError) -> None:
    if slot.checksums != run.journal.chunks(slot.folder.name):
        raise damage


def _tensor(run: QuantizationRun, block: int, damage: DamagedError) -> str:
    """Write a tensor of the output again, or have its stage solved again."""
    name, expected = damage.part, run.journal.tensors().get(damage.part)
    chunks = _from_source(run, name)
    owner = block_of(name)
    if chunks is not None:
        run.output.write_chunks(chunks)
    elif run.calibration is None and owner is not None:
        round_block(run, owner, run.source.block(owner))
    elif run.calibration is not None and owner == block:
        return _solve_again(run, block, name)
    else:
        raise damage
    run.output.sync()
    if run.output.checksum(name) != expected:
        raise damage
    return "the source"


def _from_source(
    run: QuantizationRun, name: str
) -> Iterable[Mapping[str, Tensor]] | None:
    """Return a tensor that the source alone makes, in chunks; None for codes."""
    owner = block_of(name)
    if owner is None:
        return EmbeddingAndHead(run.source, run.job.plan, run.passes.pool).tensor(name)
    unquantized = run.source.unquantized(owner, run.source.block(owner))
    return [{name: unquantized[name]}] if name in unquantized else None


def _solve_again(run: QuantizationRun, block: int, name: str) -> str:
    """Take back the stage that a tensor belongs to, and those after it."""
    prefix, stages = block_prefix(block), run.job.architecture.stages(block)
    stage = next(
        number
        for number, owner in enumerate(stages)
        for linear in owner.linears
        if name.startswith(f"{prefix}{linear.name}.")
    )
    linears = [
        prefix + linear.name for later in stages[stage:] for linear in later.linears
    ]
    tensors = [
        tensor
        for tensor in run.journal.tensors()
        if tensor.startswith(tuple(f"{linear}." for linear in linears))
    ]
    run.journal.forget_stages(block, stage, linears, tensors)
    run.output.forget(tensors)
    return f"the block's input, from stage {stages[stage].name} on"
