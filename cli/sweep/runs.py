"""From the file of a sweep to its runs: rows of the table, each once per seed.

Everything that can be refused is refused here, by planning every row and cutting the
first window of every text, before the first run starts.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.errors import RsqError, UsageError

from ..options.presets import with_preset
from ..options.quantize_options import QuantizeOptions
from ..options.resolve import prepare
from .file import Chosen, EvalOptions, SweepFile, shown

if TYPE_CHECKING:
    from rsq_stream.checkpoint.shards import Checkpoint

_ALONE = "settings"
"""Name of the one row of a file that compares nothing."""
_KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: options, to be run once per seed."""

    name: str
    options: dict[str, Any]
    """What sets this row apart, as the file has it."""
    job: QuantizeOptions


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A row whose plan stands."""

    row: Row
    plan: QuantizationPlan
    """For seed 0, without the calibration tokens."""
    checkpoint: "Checkpoint"


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One quantized model and its evaluation."""

    name: str
    """Of its row."""
    seed: int
    job: QuantizeOptions
    key: str
    """Hash of all that decides the result."""

    @property
    def label(self) -> str:
        """How lines name it."""
        return f"{self.name}, seed {self.seed}"


def rows_of(sweep: SweepFile) -> list[Row]:
    """Return the rows: the product of the grid, then the named runs.

    Raises
    ------
    UsageError
        A named run has the name of a row of the grid, or there is no such preset.
    """
    # Of no grid the product is one row, of no options: all that a file may ask for.
    product = itertools.product(*sweep.grid) if sweep.grid or not sweep.runs else ()
    rows = [_row(sweep, _label(made), made) for made in product]
    names = {row.name for row in rows}
    for name, made in sweep.runs.items():
        if name in names:
            raise UsageError(
                f"{sweep.path}: a run is named {shown(name)}, as a row of the grid is"
            )
        rows.append(_row(sweep, name, (made,)))
    return rows


def _label(made: tuple[Chosen, ...]) -> str:
    parts = [
        f"{name}={value if isinstance(value, str) else shown(value)}"
        for chosen in made
        for name, value in chosen.shown.items()
    ]
    return " ".join(parts) or _ALONE


def _row(sweep: SweepFile, name: str, made: tuple[Chosen, ...]) -> Row:
    fields = dict(sweep.settings.fields)
    options: dict[str, Any] = {}
    for chosen in made:
        fields |= chosen.fields
        options |= chosen.shown
    usual = {field.name: field.default for field in dataclasses.fields(QuantizeOptions)}
    with refused_by(f"{sweep.path}: {name}"):
        job = QuantizeOptions(**with_preset(usual | fields, fields.__contains__))
    return Row(name=name, options=options, job=_beside(sweep.path, job))


def _beside(path: Path, job: QuantizeOptions) -> QuantizeOptions:
    """Have a calibration file be one beside the sweep's file."""
    file = path.parent / job.calibration
    # A named data set stays what it is, also where a file has its name.
    named = "." not in job.calibration
    return job if named else dataclasses.replace(job, calibration=str(file))


@contextmanager
def refused_by(where: str) -> Iterator[None]:
    """Make an error say which part of the file it comes from.

    Raises
    ------
    UsageError
        In place of the error.
    """
    try:
        yield
    except RsqError as error:
        raise UsageError(f"{where}: {error}") from error


def plan_rows(sweep: SweepFile, rows: list[Row], device: str) -> list[Planned]:
    """Plan every row, as ``plan`` does; each model is opened once.

    Raises
    ------
    UsageError
        With the file, the row, and what its plan was refused for.
    """
    from rsq_stream.checkpoint.opening import open_checkpoint

    opened: dict[str | None, Checkpoint] = {}
    planned = []
    for row in rows:
        revision = row.job.revision
        if revision not in opened:
            with refused_by(f"{sweep.path}: model"):
                opened[revision] = open_checkpoint(sweep.model, revision)
        job = dataclasses.replace(row.job, device=device)
        with refused_by(f"{sweep.path}: {row.name}"):
            made = prepare(
                sweep.model,
                job,
                read_calibration=False,
                checkpoint=opened[revision],
            )
        planned.append(Planned(row=row, plan=made.plan, checkpoint=opened[revision]))
    return planned


def evaluation_of(sweep: SweepFile, planned: list[Planned]) -> EvalOptions:
    """Return the evaluation's options with the window length that they stand for."""
    from rsq_stream.evaluation.perplexity import window_length
    from rsq_stream.evaluation.result import require_text

    with refused_by(str(sweep.path)):
        require_text(str(sweep.text), "text")
    length = window_length(planned[0].checkpoint, sweep.evaluation.sequence_length)
    return dataclasses.replace(sweep.evaluation, sequence_length=length)


def runs_of(
    sweep: SweepFile,
    planned: list[Planned],
    evaluation: EvalOptions,
    models: Mapping[str | None, str],
) -> list[SweepRun]:
    """Return every run, in the order of the file, with the key of its result.

    ``models`` has the hash of the model's files by revision.
    """
    texts = _TextHashes()
    runs = []
    for made in planned:
        job, plan = made.row.job, made.plan
        fields = dataclasses.asdict(plan)
        del fields["windows_sha256"]  # not read yet; the text's hash stands for it
        decisive = {
            "model": models[job.revision],
            "bpw": job.bpw,
            "calibration": "",
            "text": texts.sha256(str(sweep.text)),
            "eval": dataclasses.asdict(evaluation),
        }
        if plan.needs_calibration:
            decisive["calibration"] = texts.sha256(job.calibration)
        for seed in sweep.seeds:
            content = decisive | {"plan": fields | {"seed": seed}}
            line = json.dumps(content, sort_keys=True)
            key = hashlib.sha256(line.encode()).hexdigest()[:_KEY_DIGITS]
            own = dataclasses.replace(job, seed=seed)
            runs.append(SweepRun(name=made.row.name, seed=seed, job=own, key=key))
    return runs


class _TextHashes:
    """The hashes of texts, each read once; a named data set is its name."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def sha256(self, text: str) -> str:
        from rsq_stream.storage.atomic import sha256_of

        path = Path(text)
        if text not in self._found:
            self._found[text] = sha256_of(path) if path.is_file() else text
        return self._found[text]


def require_texts(
    sweep: SweepFile, planned: list[Planned], evaluation: EvalOptions
) -> None:
    """Cut a window of every text, so that no run ends for want of one.

    Raises
    ------
    UsageError
        A text cannot be read or is shorter than a window.
    """
    from rsq_stream.calibration.text import read_text
    from rsq_stream.checkpoint.opening import tokenizer_of
    from rsq_stream.evaluation.perplexity import evaluation_windows
    from rsq_stream.planning.calibration import calibration_windows

    with refused_by(str(sweep.path)):
        assert evaluation.sequence_length is not None
        evaluation_windows(
            read_text(str(sweep.text), 0, "text"),
            tokenizer_of(planned[0].checkpoint),
            evaluation.sequence_length,
            bos=evaluation.bos,
            max_windows=1,
            where=f"text {sweep.text}",
        )
    longest: dict[tuple[str, str | None], Planned] = {}
    for made in planned:
        at = (made.row.job.calibration, made.row.job.revision)
        if not made.plan.needs_calibration:
            continue
        if at not in longest or (
            made.plan.sequence_length > longest[at].plan.sequence_length
        ):
            longest[at] = made
    for made in longest.values():
        one = dataclasses.replace(made.plan, samples=1)
        with refused_by(f"{sweep.path}: {made.row.name}"):
            calibration_windows(made.row.job.calibration, one, made.checkpoint)
