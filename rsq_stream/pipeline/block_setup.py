"""Open a block of a run: its module filled, its solver, as far as it was done."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rsq_stream.calibration.windows import Windows
from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.checkpoint.source import Source
from rsq_stream.config.execution_plan import ExecutionPlan
from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.model.activation_quantizer import AS_COMPUTED, ActivationQuantizer
from rsq_stream.model.architecture import Architecture
from rsq_stream.model.block import Block
from rsq_stream.model.online_rotation import OnlineRotations, planned_rotations
from rsq_stream.model.tensor_names import EMBEDDING
from rsq_stream.model.transformers_layers import Rope, layer_config
from rsq_stream.output.folder import OutputFolder
from rsq_stream.output.write_behind import WriteBehind
from rsq_stream.pipeline.activations.calibration_pass import Passes
from rsq_stream.pipeline.activations.slots import RunSlots, copy_stream, embed
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.block_progress import BlockProgress
from rsq_stream.pipeline.block_solver import BlockSolver
from rsq_stream.pipeline.linear_schemes import keeper, schemes_and_grids
from rsq_stream.pipeline.preflight import try_largest
from rsq_stream.pipeline.stage_statistics import StageStatistics
from rsq_stream.pipeline.token_importance import TokenImportance, make_importance
from rsq_stream.storage.journal import Journal


@dataclass(frozen=True, kw_only=True)
class BlockSetup:
    """What all blocks of a calibrated run have in common."""

    plan: QuantizationPlan
    importance: TokenImportance
    architecture: Architecture
    config: PretrainedConfig
    rope: Rope
    online: OnlineRotations
    source: Source
    output: OutputFolder
    journal: Journal
    slots: RunSlots
    passes: Passes
    work_dir: Path
    streams_weights: bool
    """Weights of linears lie in host memory, and are fetched for each use."""
    keeps_weights: bool
    """The solver's stay on the device."""
    codes: WriteBehind
    """What the solver's codes go through on their way to the output."""

    @property
    def progress(self) -> BlockProgress:
        """The durable side of a block's stages."""
        return BlockProgress(
            plan=self.plan,
            journal=self.journal,
            output=self.output,
            h=[slots.h for slots in self.slots.of_block(0)],
            source=self.source,
            work_dir=self.work_dir,
            stages_of=self.architecture.stages,
            settle=self.codes.settle,
        )

    def close(self) -> None:
        """Stop the threads that read and write."""
        self.codes.close()
        self.slots.close()

    def embed(self, windows: Windows) -> None:
        """Write the first block's input, durably, from the output's embedding.

        Raises
        ------
        DamagedError
            The embedding is not what was written.
        """
        self.output.require_tensor(EMBEDDING)
        rows = partial(self.output.read_rows, EMBEDDING)
        embed(self.slots.inputs_of(0), windows, rows, self.passes.check)

    def open(
        self, index: int, tensors: dict[str, Tensor], stages: int | None = None
    ) -> tuple[BlockSolver, int]:
        """Give a block's solver and how many stages are done; takes the tensors.

        Their linears hold the quantized weights. Without ``stages``, the journal says
        how many, and what they left behind is taken up.

        Raises
        ------
        DamagedError
            What the finished stages left behind is not what they wrote.
        """
        schemes, grids = schemes_and_grids(index, self.plan, self.source, tensors)
        compute = getattr(torch, self.plan.compute_type)
        weights, cast = placed(
            tensors,
            self.architecture.linears(index),
            compute,
            streams=self.streams_weights,
            keeps=self.keeps_weights,
        )
        # Both hold the source's weights, until those of the first are replaced; and
        # only the first sees activations as the served model does.
        quantizers = ActivationQuantizer(self.plan), AS_COMPUTED
        streams = [
            Stream(
                Block(
                    self.architecture.family,
                    self.config,
                    index,
                    cast,
                    self.rope,
                    online=self.online,
                    quantizer=quantizer,
                ),
                slots,
                self.plan,
            )
            for slots, quantizer in zip(
                self.slots.of_block(index), quantizers, strict=False
            )
        ]
        block, progress = streams[0].block, self.progress
        done = self.journal.stages(index) if stages is None else stages
        for linear, dtype in self.source.linear_types(index).items():
            if linear not in schemes:  # kept: the quantized model has it as stored
                block.replace_weight(linear, weights.pop(linear).to(dtype))
        progress.replace_solved(index, block, done)
        of_block = self.architecture.stages(index)
        for stage in of_block[:done]:  # the solver wants those of the others alone
            for solved in stage.linears:
                weights.pop(solved.name, None)
        known_BT = progress.take_up(index, block, done) if stages is None else None
        solver = BlockSolver(
            index=index,
            streams=streams,
            weights=weights,
            schemes=schemes,
            grids=grids,
            plan=self.plan,
            passes=self.passes,
            keep=keeper(index, self.plan, self.source, self.codes.write),
            finish_stage=partial(progress.finish_stage, index),
            statistics=StageStatistics(
                index=index,
                streams=streams,
                plan=self.plan,
                passes=self.passes,
                importance=self.importance,
                stages=of_block,
                known_BT=known_BT,
            ),
            stages=of_block,
        )
        return solver, done


def placed(
    tensors: dict[str, Tensor],
    linears: Collection[str],
    compute: torch.dtype,
    *,
    streams: bool,
    keeps: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the linears' weights for the solver, and all tensors for the passes.

    The first in fp32 in host memory: of them the solver wants one at a time. Each
    tensor is dropped on the way, so that the device never has all of both, unless it
    ``keeps`` them. With ``streams`` the passes' linears lie in host memory too.
    """
    weights, cast = {}, {}
    for name in list(tensors):
        tensor, linear = tensors.pop(name), name.removesuffix(".weight")
        cast[name] = tensor.to(compute)
        if linear in linears:
            weights[linear] = tensor if keeps else tensor.to("cpu")
            if streams:
                cast[name] = cast[name].to("cpu")
    return weights, cast


def set_up(
    checkpoint: Checkpoint,
    architecture: Architecture,
    plan: QuantizationPlan,
    execution: ExecutionPlan,
    device: torch.device,
    source: Source,
    output: OutputFolder,
    journal: Journal,
    passes: Passes,
    work_dir: Path,
    windows: Windows,
) -> BlockSetup:
    """Make what all blocks share: RoPE tables, activation slots, the importance.

    Raises
    ------
    BudgetError
        The largest linear is tried first, and memory ran out.
    """
    if execution.tries_largest:
        try_largest(architecture, plan, device, passes)
    importance = make_importance(plan, windows)
    family = architecture.family
    config = layer_config(family, checkpoint.config)
    compute = getattr(torch, plan.compute_type)
    rope = Rope(family, config, plan.sequence_length, compute, device)
    width, listener = architecture.width, passes.listener
    slots = RunSlots(plan, width, execution, work_dir, listener, device)
    return BlockSetup(
        plan=plan,
        importance=importance,
        architecture=architecture,
        config=config,
        rope=rope,
        online=planned_rotations(plan, architecture),
        source=source,
        output=output,
        journal=journal,
        slots=slots,
        passes=passes,
        work_dir=work_dir,
        streams_weights=execution.streams_weights,
        keeps_weights=execution.keeps_weights,
        codes=WriteBehind(output, copy_stream(device)),
    )
