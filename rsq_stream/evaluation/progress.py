"""Progress of an evaluation of several models, as one count of blocks."""

import dataclasses
from collections.abc import Sequence

from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.events import Event, Listener, RunStarted, StageStarted, UnitsDone
from rsq_stream.model.architecture import read_architecture


def counting_on(listener: Listener, models: Sequence[Checkpoint]) -> Listener:
    """Return a listener that numbers the blocks of all models in one sequence.

    Evaluation begins again with each model. ``listener`` hears at once how many blocks
    there are.
    """
    blocks = (read_architecture(m.config, m.files.where).blocks for m in models)
    listener(RunStarted(blocks=sum(blocks), first_block=0, tokens=0))
    block = -1

    def listen(event: Event) -> None:
        nonlocal block
        block += isinstance(event, StageStarted)
        if isinstance(event, StageStarted | UnitsDone):
            event = dataclasses.replace(event, block=block)
        listener(event)

    return listen
