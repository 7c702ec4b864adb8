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

from torch import Tensor

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.source import Source
from rsq_stream.errors import DamagedError
from rsq_stream.events import Listener, Notice
from rsq_stream.model.tensor_names import block_of, block_prefix
from rsq_stream.output.folder import OutputFolder
from rsq_stream.pipeline.block_progress import TOKEN_WEIGHTS
from rsq_stream.pipeline.block_setup import BlockSetup
from rsq_stream.pipeline.block_solver import BlockSolver
from rsq_stream.pipeline.embedding_and_head import Outer
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.journal import Journal


class Rebuilder:
    """Mends what a run finds damaged; the same thing once a block."""

    def __init__(
        self,
        journal: Journal,
        output: OutputFolder,
        source: Source,
        outer: Outer,
        setup: BlockSetup | None,
        round_again: Callable[[int], object],
        listener: Listener,
    ) -> None:
        """Without ``setup`` there are no activations, and blocks are only rounded."""
        self._journal = journal
        self._output = output
        self._source = source
        self._outer = outer
        self._setup = setup
        self._round_again = round_again
        self._listener = listener
        self._tried: set[tuple[int, str]] = set()

    def rebuild(
        self, block: int, windows: Windows | None, damage: DamagedError
    ) -> None:
        """Make again what is damaged, while ``block`` is the one in work.

        Raises
        ------
        DamagedError
            The same one: nothing is left to make it from.
        """
        if (block, damage.part) in self._tried:
            raise damage
        self._tried.add((block, damage.part))
        try:
            made_from = self._rebuilt(block, windows, damage)
        except DamagedError as other:
            raise damage from other
        text = f"{damage.what}; made again from {made_from}"
        self._listener(Notice(text=text))

    def _rebuilt(
        self, block: int, windows: Windows | None, damage: DamagedError
    ) -> str:
        setup, part = self._setup, damage.part
        if setup is None:
            return self._tensor(block, damage)
        for number, slots in enumerate(setup.slots.of_block(block)):
            if part == slots.x.folder.name:
                return self._input(setup, block, number, windows, damage)
            if part == slots.h.folder.name:
                solver, _ = self._open(setup, block, self._journal.stages(block))
                solver.streams[number].replay_h(setup.passes, block)
                self._require_same(slots.h, damage)
                return "the block's input"
        if part == TOKEN_WEIGHTS:
            solver, _ = self._open(setup, block, 0)
            written = setup.progress.write_token_weights(solver.statistics.weigh())
            if written != self._journal.chunks(TOKEN_WEIGHTS).get(block):
                raise damage
            return "the block's input"
        return self._tensor(block, damage)

    def _input(
        self,
        setup: BlockSetup,
        block: int,
        stream: int,
        windows: Windows | None,
        damage: DamagedError,
    ) -> str:
        """Make a stream's input of a block again: what the block before put out."""
        x = setup.slots.inputs_of(block)[stream]
        if block == 0:
            if windows is None:
                raise damage
            setup.embed(windows)
        else:
            stages = len(setup.architecture.stages(block - 1))
            solver, _ = self._open(setup, block - 1, stages)
            solver.streams[stream].replay_h(setup.passes, block - 1)
            solver.streams[stream].advance(setup.passes, block - 1)
        self._require_same(x, damage)
        return f"the input of block {block - 1}" if block else "the calibration windows"

    def _open(
        self, setup: BlockSetup, block: int, stages: int
    ) -> tuple[BlockSolver, int]:
        """Open a block with so many stages done, and its inputs known."""
        for slot in setup.slots.inputs_of(block):
            slot.checksums = slot.checksums or self._journal.chunks(slot.folder.name)
        return setup.open(block, self._source.block(block), stages)

    def _require_same(self, slot: Slot, damage: DamagedError) -> None:
        if slot.checksums != self._journal.chunks(slot.folder.name):
            raise damage

    def _tensor(self, block: int, damage: DamagedError) -> str:
        """Write a tensor of the output again, or have its stage solved again."""
        name, wanted = damage.part, self._journal.tensors().get(damage.part)
        chunks = self._from_source(name)
        owner = block_of(name)
        if chunks is not None:
            self._output.write_chunks(chunks)
        elif self._setup is None and owner is not None:
            self._round_again(owner)
        elif self._setup is not None and owner == block:
            return self._solve_again(self._setup, block, name)
        else:
            raise damage
        self._output.sync()
        if self._output.checksum(name) != wanted:
            raise damage
        return "the source"

    def _from_source(self, name: str) -> Iterable[Mapping[str, Tensor]] | None:
        """Give a tensor that the source alone makes, in chunks; None for codes."""
        owner = block_of(name)
        if owner is None:
            return self._outer.tensor(name)
        kept = self._source.unquantized(owner, self._source.block(owner))
        return [{name: kept[name]}] if name in kept else None

    def _solve_again(self, setup: BlockSetup, block: int, name: str) -> str:
        """Take back the stage that a tensor belongs to, and those after it."""
        prefix, stages = block_prefix(block), setup.architecture.stages(block)
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
            for tensor in self._journal.tensors()
            if tensor.startswith(tuple(f"{linear}." for linear in linears))
        ]
        self._journal.forget_stages(block, stage, linears, tensors)
        self._output.forget(tensors)
        return f"the block's input, from stage {stages[stage].name} on"
