"""Write a linear's codes to the output while a GPU works on the next linear.

Packing is launched with the rest of the compute, and takes no time to speak of; what
takes time is the way to the host, the checksum and the file. One linear at a time is on
that way, and all are there before their stage is journalled.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import torch
from torch import Tensor

from rsq_stream.output.folder import OutputFolder
from rsq_stream.runtime.copy_stream import CopyStream, StreamEvent


class WriteBehind:
    """Writes to the output, in a thread of its own where there is a copy stream.

    Inside a ``with`` block writes may be under way; after it, none is.
    """

    def __init__(self, output: OutputFolder, stream: CopyStream | None) -> None:
        self._output = output
        self._stream = stream
        self._worker = ThreadPoolExecutor(1, "rsq-codes") if stream else None
        self._job: Future[None] | None = None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write tensors, which are then the writer's own; waits for those before.

        Raises
        ------
        RsqError
            Those before could not be written.
        """
        if self._stream is None or self._worker is None:
            self._output.write(tensors)
            return
        self.flush()
        made = self._stream.now()
        self._job = self._worker.submit(self._land, self._stream, tensors, made)

    def _land(
        self, stream: CopyStream, tensors: dict[str, Tensor], made: StreamEvent
    ) -> None:
        host: dict[str, Tensor] = {}
        for name in list(tensors):
            tensor = tensors[name]
            host[name] = torch.empty_like(tensor, device="cpu")
            stream.copy(host[name], tensor, made).synchronize()
            del tensors[name], tensor  # its memory was the copy's until now
        self._output.write(host)

    def flush(self) -> None:
        """Wait until all is written that was to be.

        Raises
        ------
        RsqError
            It could not be.
        """
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
            return
        with suppress(Exception):  # what ended the work is what is said
            self.flush()

    def close(self) -> None:
        """Stop writing."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
