"""A toy run whose disk is known at each of its steps, to die at any and be resumed."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from rsq_stream.errors import OutputError
from rsq_stream.events import Event, Notice
from tests.support.faults import RUN, Image, Recording, blocks_done, restore
from tests.support.toy import Recorder, contents, run_toy

ALL = bool(os.environ.get("RSQ_ALL_FAULTS"))
EXAMPLES = 1000 if ALL else 150


@dataclass(frozen=True)
class Crash:
    """A toy, its output in one go, and the disk at each step of the way there."""

    toy: Path
    recording: Recording
    whole: dict[str, bytes]
    _gone_on: dict[frozenset[tuple[Path, bytes | None]], list[Event]] = field(
        default_factory=dict
    )

    def __repr__(self) -> str:
        return "Crash()"  # hypothesis prints it

    def resumed(self, image: Image) -> list[Event]:
        """Make a crash's disk and run again: whole, and no journalled block repeated.

        Gives what was said. A disk that was whole again once is not tried twice: most
        steps leave it as the next one finds it.
        """
        disk = frozenset(image.items())
        if disk in self._gone_on and not ALL:
            return self._gone_on[disk]
        output, work = self.recording.folders
        restore(image, output, work)
        recorder = Recorder()
        try:
            summary = run_toy(self.toy, output, listener=recorder, **RUN)
        except OutputError as error:
            if "holds a finished output" not in str(error):
                raise
            # It died removing its work folder, the journal already gone.
            shutil.rmtree(work, ignore_errors=True)
        else:
            assert summary.resumed_at == blocks_done(image)
        assert contents(output) == self.whole
        assert not work.exists()
        self._gone_on[disk] = recorder.events
        return recorder.events


def made_again(events: list[Event]) -> list[str]:
    return [e.text for e in events if isinstance(e, Notice) and "made again" in e.text]
