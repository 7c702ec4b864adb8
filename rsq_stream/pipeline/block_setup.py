"""Open a block of a run: its module filled, its solver, as far as it was done."""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from rsq_stream.calibration.windows import Windows
from rsq_stream.model.activation_quantizer import AS_COMPUTED, ActivationQuantizer
from rsq_stream.model.tensor_names import EMBEDDING
from rsq_stream.pipeline.activations.slots import embed
from rsq_stream.pipeline.activations.stream import Stream
from rsq_stream.pipeline.block_progress import replace_solved, restore
from rsq_stream.pipeline.block_solver import BlockSolver
from rsq_stream.pipeline.linear_schemes import schemes_and_grids
from rsq_stream.pipeline.run import QuantizationRun
from rsq_stream.pipeline.stage_statistics import StageStatistics


def embed_windows(run: QuantizationRun, windows: Windows) -> None:
    """Write the first block's input, durably, from the output's embedding.

    Raises
    ------
    DamagedError
        The embedding is not what was written.
    """
    run.output.require_tensor(EMBEDDING)
    rows = partial(run.output.read_rows, EMBEDDING)
    embed(run.calibrated.slots.inputs_of(0), windows, rows, run.passes.check)


def open_block(
    run: QuantizationRun,
    index: int,
    tensors: dict[str, Tensor],
    stages: int | None = None,
) -> BlockSolver:
    """Return a block's solver, past the stages that are done; take the tensors.

    The linears of those stages hold their quantized weights. Without ``stages``, the
    journal says how many are done, and what they left behind is restored.

    Raises
    ------
    DamagedError
        What the finished stages left behind is not what they wrote.
    """
    job, shared = run.job, run.calibrated
    quantized = schemes_and_grids(run, index, tensors)
    linears = job.architecture.linears(index)
    weights, cast = place_weights(
        tensors,
        linears,
        getattr(torch, job.plan.compute_type),
        offloads=job.execution.offloads_weights,
        keeps=job.execution.keeps_solver_weights_on_gpu,
    )
    # Both hold the source's weights, until those of the first are replaced; and
    # only the first sees activations as the served model does.
    quantizers = ActivationQuantizer(job.plan), AS_COMPUTED
    streams = [
        Stream(
            block=shared.block(job, index, cast, quantizer),
            slots=slots,
            plan=job.plan,
        )
        for slots, quantizer in zip(
            shared.slots.of_block(index), quantizers, strict=False
        )
    ]
    block = streams[0].block
    done = run.journal.stages(index) if stages is None else stages
    for linear, dtype in run.source.linear_types(index).items():
        if linear not in quantized:  # the quantized model has it as it is stored
            block.replace_weight(linear, weights.pop(linear).to(dtype))
    replace_solved(run, index, block, done)
    for stage in job.architecture.stages(index)[:done]:
        for solved in stage.linears:  # the solver wants those of the others alone
            weights.pop(solved.name, None)
    known_BT = restore(run, index, block, done) if stages is None else None
    return BlockSolver(
        run=run,
        index=index,
        streams=streams,
        weights=weights,
        quantized=quantized,
        statistics=StageStatistics(
            run=run,
            index=index,
            importance=shared.importance,
            streams=streams,
            known_BT=known_BT,
        ),
        done=done,
    )


def place_weights(
    tensors: dict[str, Tensor],
    linears: Collection[str],
    compute: torch.dtype,
    *,
    offloads: bool,
    keeps: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the linears' weights for the solver, and all tensors for the passes.

    The first are in fp32 in host memory, because the solver wants one at a time. Each
    tensor is dropped on the way, so that the device never has all of both, unless it
    ``keeps`` them. With ``offloads`` the passes' linears lie in host memory too.
    """
    weights, cast = {}, {}
    for name in list(tensors):
        tensor, linear = tensors.pop(name), name.removesuffix(".weight")
        cast[name] = tensor.to(compute)
        if linear in linears:
            weights[linear] = tensor if keeps else tensor.to("cpu")
            if offloads:
                cast[name] = cast[name].to("cpu")
    return weights, cast
