"""A write that fails, a bit that flips, wherever: said, and made good by the next run.

``make test-faults`` tries every step for every kind; here some are sampled.
"""

import errno
import os
import random

import pytest

from rsq_stream.errors import DiskFullError, RsqError, ScratchError
from tests.support.crashes import ALL, EXAMPLES, Crash, made_again
from tests.support.faults import RUN, Recording, failing, look, restore
from tests.support.toy import contents, run_toy


def _steps(recording: Recording, stride: int, *, short: bool) -> list[int]:
    """Sample the steps; to leave half of it, a step must have written."""
    moments = recording.moments
    fit = [
        at
        for at, moment in enumerate(moments)
        if not short or (moment.when, moment.kind) == ("after", "write")
    ]
    return fit[:: 1 if ALL else stride]


@pytest.mark.parametrize(
    ("code", "short", "stride"),
    [(errno.ENOSPC, False, 4), (errno.EIO, False, 7), (errno.ENOSPC, True, 2)],
)
def test_a_step_that_fails(
    crash: Crash,
    code: int,
    short: bool,
    stride: int,
) -> None:
    failed, output = 0, crash.recording.folders[0]
    steps = _steps(crash.recording, stride, short=short)
    for at in steps:
        restore({}, *crash.recording.folders)
        try:
            with failing(at, OSError(code, os.strerror(code)), short=short) as done:
                run_toy(crash.toy, output, **RUN)
        except ScratchError as error:
            said, failed = str(error), failed + 1
            full = isinstance(error, DiskFullError)
        else:
            continue
        assert "\n" not in said
        assert full == (code == errno.ENOSPC)
        assert ("the rest of the run needs" in said) == full, done[-1]
        crash.resumed(look(*crash.recording.folders))
    assert failed > len(steps) * 0.9


def test_a_flipped_bit_is_mended_or_named(crash: Crash) -> None:
    chooser, ends = random.Random(0), {"same": 0, "mended": 0, "refused": 0}
    output, work = crash.recording.folders
    for _ in range(EXAMPLES):
        image = dict(chooser.choice(crash.recording.moments).image)
        files = [path for path, content in image.items() if content]
        if not files:
            continue
        path = chooser.choice(files)
        content = bytearray(image[path] or b"")
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        image[path] = bytes(content)
        try:
            mended = made_again(crash.resumed(image))
        except AssertionError:
            # Damage in an output that was finished is verify's to find.
            if work.exists() or not (output / "rsq_stream.sha256").exists():
                raise
            continue
        except RsqError as error:
            named = path.name in str(error) or f"/{path.parent.name}:" in str(error)
            assert named, (path, error)  # noqa: PT017  either end is sound
            ends["refused"] += 1
            run_toy(crash.toy, output, options={"restart": True}, **RUN)
            assert contents(output) == crash.whole
        else:
            ends["mended" if mended else "same"] += 1
    assert min(ends.values()) > EXAMPLES / 50, ends
