"""``rsq-stream sweep``: a grid of settings and seeds; mean and deviation of each."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsq_stream.errors import Interrupted

from ..display.text import remark
from ..options.common import (
    Debug,
    Json,
    KeepModels,
    ListRuns,
    Processes,
    Quiet,
    SweepDevice,
    SweepOutput,
    SweepPath,
)
from ..signals import StopRequest
from ..sweep.file import EvalOptions, SweepFile, read_sweep
from ..sweep.folder import SweepFolder
from ..sweep.places import Place, places_for
from ..sweep.pool import run_all
from ..sweep.report import list_runs, report
from ..sweep.runs import (
    Planned,
    Row,
    SweepRun,
    evaluation_of,
    plan_rows,
    require_texts,
    rows_of,
    runs_of,
)
from ..sweep.worker import task_of


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """A sweep that may begin: everything in it is checked."""

    file: SweepFile
    folder: SweepFolder
    rows: list[Row]
    planned: list[Planned]
    evaluation: EvalOptions
    places: tuple[Place, ...]


def sweep(
    file: SweepPath,
    *,
    output: SweepOutput = None,
    device: SweepDevice = None,
    processes: Processes = None,
    keep_models: KeepModels = False,
    dry_run: ListRuns = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize and evaluate a grid of settings and seeds; show mean and deviation.

    The same command goes on where a sweep stopped; what is finished is not run again.
    """
    del debug
    silent = quiet or as_json
    made, left_out = _checked(file, output, device, processes)
    if left_out and not silent:
        names = ", ".join(left_out)
        remark("notice", f"{names} left out: not of the kind of {made.places[0].name}")
    began = not made.folder.is_new
    if dry_run or not began:
        runs = _runs(made, keep=False)
        _require_texts(made, runs)  # before anything is written
    if dry_run:
        list_runs(made.folder, runs, as_json=as_json)
        return
    with made.folder:
        runs = _runs(made, keep=True)
        made.folder.clean()
        if began:
            _require_texts(made, runs)
        failures = _run(made, runs, keep_models=keep_models, silent=silent)
        report(made.folder, made.rows, runs, failures, as_json=as_json, quiet=quiet)


def _checked(
    file: Path, output: Path | None, device: str | None, processes: int | None
) -> tuple[_Sweep, tuple[str, ...]]:
    """Check the file and every plan; gives GPUs that are left out beside."""
    found = read_sweep(file)
    rows = rows_of(found)
    places, left_out = places_for(device, processes)
    folder = SweepFolder(output or file.with_suffix(".sweep"))
    # Planned where it will run; by its own process, a GPU is the only one.
    planned = plan_rows(found, rows, places[0].name)
    made = _Sweep(
        file=found,
        folder=folder,
        rows=rows,
        planned=planned,
        evaluation=evaluation_of(found, planned),
        places=places,
    )
    return made, left_out


def _runs(made: _Sweep, *, keep: bool) -> list[SweepRun]:
    """Return every run with its key, for which the model's files are hashed once."""
    models: dict[str | None, str] = {}
    for plan in made.planned:
        revision = plan.row.job.revision
        if revision in models:
            continue
        if not keep and made.folder.is_new:
            models[revision] = ""  # there is no result that a key could find
        else:
            models[revision] = made.folder.model_sha256(plan.checkpoint, keep=keep)
    return runs_of(made.file, made.planned, made.evaluation, models)


def _require_texts(made: _Sweep, runs: Sequence[SweepRun]) -> None:
    """Check the texts of what is still to run; a finished sweep needs none."""
    names = {run.name for run in _missing(made.folder, runs)}
    left = [planned for planned in made.planned if planned.row.name in names]
    if left:
        require_texts(made.file, left, made.evaluation)


def _missing(folder: SweepFolder, runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the runs without a result; rows that say the same share one."""
    by_key = {run.key: run for run in reversed(runs)}
    return [
        run for run in runs if by_key[run.key] is run and folder.result(run.key) is None
    ]


def _run(
    made: _Sweep,
    runs: Sequence[SweepRun],
    *,
    keep_models: bool,
    silent: bool,
) -> dict[str, str]:
    """Do the missing runs; gives the failures by the key of the run."""
    folder, missing = made.folder, _missing(made.folder, runs)
    total = len({run.key for run in runs})
    done = total - len(missing)
    if not silent:
        where = ", ".join(dict.fromkeys(place.name for place in made.places))
        remark(
            "notice",
            f"{total} runs, {done} of them finished; {len(made.places)} at a time on"
            f" {where}; results and logs are in {folder.path}",
        )
    if keep_models and not silent:
        _say_what_is_not_kept(folder, runs)
    failures: dict[str, str] = {}
    with StopRequest() as stop:
        begin = _beginner(made, keep_models=keep_models)
        for ended in run_all(missing, made.places, begin, stop.event):
            run = ended.run
            if ended.failure is not None:
                failures[run.key] = ended.failure
                at = folder.run_folder(run.key)
                hint = f"its log.txt is in {at}; remove that to start it over"
                remark("failed", f"{run.label}: {ended.failure}; {hint}")
                continue
            done += 1
            found = folder.result(run.key)
            assert found is not None
            folder.clean()
            if not silent:
                kept = f"  {found['output']}" if found["output"] else ""
                remark(
                    "done",
                    f"{done}/{total}  {run.label}  perplexity"
                    f" {found['perplexity']:.3f}  {found['seconds']:.1f} s"
                    f"  {ended.place.name}{kept}",
                )
        left = len(_missing(folder, runs))
        if stop.event.is_set() and left > len(failures):
            raise Interrupted(
                f"stopped with {total - left} of {total} runs finished; the same"
                " command goes on where each stopped"
            )
    return failures


def _say_what_is_not_kept(folder: SweepFolder, runs: Sequence[SweepRun]) -> None:
    """Name results whose model was removed when they were made."""
    found = {run.key: folder.result(run.key) for run in runs}
    gone = [key for key, result in found.items() if result and not result["output"]]
    if gone:
        remark(
            "notice",
            f"--keep-models: {len(gone)} finished runs have no model any more; remove"
            f" their files to run them again, such as {folder.result_path(gone[0])}",
        )


def _beginner(made: _Sweep, *, keep_models: bool) -> Callable[[SweepRun, Place], Path]:
    def begin(run: SweepRun, place: Place) -> Path:
        job = dataclasses.replace(
            run.job,
            device=place.device,
            threads=run.job.threads or place.threads,
            ram=run.job.ram or place.ram,
        )
        about = {
            "name": run.name,
            "seed": run.seed,
            "key": run.key,
            "model": made.file.model,
            "text": str(made.file.text),
            "eval": dataclasses.asdict(made.evaluation),
            "job": task_of(job),
        }
        task = {
            "model": made.file.model,
            "job": task_of(job),
            "text": str(made.file.text),
            "eval": dataclasses.asdict(made.evaluation),
            "about": about,
            "keep_model": keep_models,
            "result": str(made.folder.result_path(run.key)),
        }
        return made.folder.begin(run.key, task)

    return begin
