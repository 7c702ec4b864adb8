"""How far a block is: stages are made durable one by one, and picked up again.

A killed run repeats at most the stage it was in. What a later stage needs of the
earlier ones is on disk when their rows are committed: codes in the partial shard,
the tokens' weights after the first stage, h after the third.
"""

import dataclasses
import zlib
from pathlib import Path

import torch
from safetensors.torch import load, save

from rsq_stream.block_solver import TokenWeights
from rsq_stream.config import QuantizationPlan
from rsq_stream.errors import ScratchError
from rsq_stream.events import LinearRecord
from rsq_stream.model.architecture import STAGES, block_prefix
from rsq_stream.model.block import Block
from rsq_stream.output_folder import OutputFolder
from rsq_stream.packed_format import decode_linear, scheme_for
from rsq_stream.storage import atomic
from rsq_stream.storage.activations import Slot
from rsq_stream.storage.journal import Journal

_WEIGHTS = "token-weights.safetensors"
_KEEPS_H = 2
"""The stage that writes h."""


@dataclasses.dataclass(frozen=True)
class BlockProgress:
    """The durable side of a block's stages."""

    plan: QuantizationPlan
    journal: Journal
    output: OutputFolder
    h: Slot
    work_dir: Path

    def finish_stage(
        self,
        index: int,
        stage: int,
        records: list[LinearRecord],
        token_weights: TokenWeights,
    ) -> None:
        """Make a stage's bytes durable, then journal it."""
        chunks = {}
        if stage == 0:
            content = save(
                {
                    str(unit): weight_T.to("cpu", torch.bfloat16)
                    for unit, weight_T in token_weights.items()
                }
            )
            atomic.write_file(self.work_dir / _WEIGHTS, content)
            chunks[_WEIGHTS] = {index: zlib.crc32(content)}
        if stage == _KEEPS_H:
            self.h.flush(durable=True)
            chunks[self.h.folder.name] = self.h.checksums
        self.output.sync()
        self.journal.finish_stage(
            index,
            stage,
            chunks,
            {made.name: dataclasses.asdict(made) for made in records},
            self.output.new_checksums(),
        )

    def restore(self, index: int, block: Block) -> tuple[int, TokenWeights]:
        """Give a block the quantized weights it had when the run stopped.

        Returns how many stages are done, and the weights of the tokens.

        Raises
        ------
        ScratchError, OutputError
            What the finished stages left behind is damaged.
        """
        done = self.journal.stages(index)
        if done == 0:
            return 0, {}
        for stage in STAGES[:done]:
            for linear in stage.linears:
                name = block_prefix(index) + linear
                scheme = scheme_for(self.plan, block.weight(linear).shape[1])
                decoded_OI = decode_linear(self.output.read, name, scheme)
                block.replace_weight(linear, decoded_OI)
        if done > _KEEPS_H:
            self.h.checksums = self.journal.chunks(self.h.folder.name)
        return done, self._token_weights(index, block)

    def _token_weights(self, index: int, block: Block) -> TokenWeights:
        path = self.work_dir / _WEIGHTS
        with atomic.explained(path):
            content = path.read_bytes()
        if self.journal.chunks(_WEIGHTS).get(index) != zlib.crc32(content):
            raise ScratchError(f"{path}: is damaged; --restart starts the run over")
        device = block.weight(STAGES[0].linears[0]).device
        return {
            int(unit): weight_T.float().to(device)
            for unit, weight_T in load(content).items()
        }
