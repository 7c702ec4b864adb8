"""How far a block is: stages are made durable one by one, and picked up again.

A killed run repeats at most the stage it was in. What a later stage needs of the
earlier ones is on disk when their rows are committed: codes in the partial shard,
the tokens' weights after the first stage, h after the third.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from rsq_stream.checkpoint.formats import FORMATS
from rsq_stream.checkpoint.source import Source
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import DamagedError
from rsq_stream.events import LinearRecord
from rsq_stream.model.block import Block
from rsq_stream.model.families.base import STAGES, WRITES_H
from rsq_stream.model.tensor_names import block_prefix
from rsq_stream.output.folder import OutputFolder
from rsq_stream.pipeline.token_importance import TokenWeights
from rsq_stream.storage import atomic
from rsq_stream.storage.activation_cache import Slot
from rsq_stream.storage.checksum import checksum
from rsq_stream.storage.journal import Journal

TOKEN_WEIGHTS = "token-weights.safetensors"


@dataclasses.dataclass(frozen=True)
class BlockProgress:
    """The durable side of a block's stages."""

    plan: QuantizationPlan
    journal: Journal
    output: OutputFolder
    h: list[Slot]
    """Each stream's h."""
    source: Source
    work_dir: Path
    settle: Callable[[], None]
    """Waits for codes that are still on their way to the output."""

    def finish_stage(
        self,
        index: int,
        stage: int,
        records: list[LinearRecord],
        token_weights: TokenWeights,
    ) -> None:
        """Make a stage's bytes durable, then journal it."""
        self.settle()
        chunks = {}
        if stage == 0:
            chunks[TOKEN_WEIGHTS] = {index: self.write_token_weights(token_weights)}
        if stage == WRITES_H:
            for slot in self.h:
                slot.flush(durable=True)
                chunks[slot.folder.name] = slot.checksums
        self.output.sync()
        self.journal.finish_stage(
            index,
            stage,
            chunks,
            {made.name: dataclasses.asdict(made) for made in records},
            self.output.new_checksums(),
            self.source.news(),
        )

    def write_token_weights(self, token_weights: TokenWeights) -> int:
        """Keep the tokens' importance for later stages; gives the file's checksum."""
        content = save({"weight": token_weights.weight_BT.to("cpu")})
        atomic.write_file(self.work_dir / TOKEN_WEIGHTS, content)
        return checksum(content)

    def replace_solved(self, index: int, block: Block, done: int) -> None:
        """Give a block the quantized weights of its first ``done`` stages.

        Raises
        ------
        DamagedError
            A tensor in the output is not what was written.
        """
        stored = FORMATS[self.plan.output_format]
        for stage in STAGES[:done]:
            for linear in stage.linears:
                name = block_prefix(index) + linear
                scheme = self.plan.scheme(name, block.weight(linear).shape[1])
                if scheme is not None:
                    decoded_OI = stored.decode(self.output.read, name, scheme)
                    block.replace_weight(linear, decoded_OI)

    def take_up(self, index: int, block: Block, done: int) -> Tensor | None:
        """Take up what the first ``done`` stages left in the work folder.

        Raises
        ------
        DamagedError
            The tokens' weights are not what was written.
        """
        if done == 0:
            return None
        if done > WRITES_H:
            for slot in self.h:
                slot.checksums = self.journal.chunks(slot.folder.name)
        path = self.work_dir / TOKEN_WEIGHTS
        content = path.read_bytes() if path.is_file() else b""
        if self.journal.chunks(TOKEN_WEIGHTS).get(index) != checksum(content):
            raise DamagedError(f"{path}: is damaged or missing", path.name)
        return load(content)["weight"].to(block.device)
