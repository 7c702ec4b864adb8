"""The file of a sweep: what is refused, which rows and runs it stands for."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rsq_stream.cli.options.by_name import job_options
from rsq_stream.cli.options.quantize_options import QuantizeOptions
from rsq_stream.cli.sweep.file import EvalOptions, read_sweep
from rsq_stream.cli.sweep.runs import (
    SweepRun,
    evaluation_of,
    plan_rows,
    require_texts,
    rows_of,
    runs_of,
)

from rsq_stream.demo import MODEL
from rsq_stream.errors import UsageError
from tests.cli.test_command_line import JOB_FLAGS, SERVED_FLAGS

TOP = f'model = "{MODEL}"\ntext = "text.txt"\n'
CHECKED = "calibration = 'text.txt'\n[settings]\nsequence-length = 32\n"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a sweep's file, with a text beside it."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 90)

    def call(content: str | bytes) -> Path:
        path = tmp_path / "s.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return call


def check_all(path: Path) -> None:
    sweep = read_sweep(path)
    planned = plan_rows(sweep, rows_of(sweep), "cpu")
    require_texts(sweep, planned, evaluation_of(sweep, planned))


def runs_in(path: Path) -> list[SweepRun]:
    sweep = read_sweep(path)
    planned = plan_rows(sweep, rows_of(sweep), "cpu")
    evaluation = evaluation_of(sweep, planned)
    runs: list[SweepRun] = runs_of(sweep, planned, evaluation, {None: "model"})
    return runs


def test_options_have_the_names_of_the_flags() -> None:
    flags = (JOB_FLAGS + SERVED_FLAGS).split()
    assert set(job_options()) == {flag.removeprefix("--") for flag in flags}
    fields = {option.field for option in job_options().values()}
    assert fields == {field.name for field in dataclasses.fields(QuantizeOptions)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "model is missing: a sweep needs a model and an evaluation text"),
        ("model = ", "not valid TOML (Invalid value (at "),
        (b'model = "\xe9"', "not valid TOML ('utf-8' codec can't decode byte"),
        (TOP + "seed = 1", "seed is not a key of a sweep's file; did you mean seeds?"),
        (TOP + "xyz = 1", "xyz is not a key of a sweep's file; there are calibration,"),
        ("model = 3\ntext = 'a'", "model must be a string, not 3"),
        ("model = ''\ntext = 'a'", 'model must be a string, not ""'),
        (TOP + "grid = 3", "grid must be a table, [grid], not 3"),
        (TOP + "[run]\nname = 'a'", "run must be tables, each [[run]], not {"),
        (TOP + "seeds = 3", "seeds must be a list, not 3"),
        (TOP + "seeds = []", "seeds must be a list of different whole numbers"),
        (TOP + "seeds = [1, 1]", "seeds must be a list of different whole numbers"),
        (TOP + "seeds = [true]", "seeds must be a list of different whole numbers"),
        (TOP + "seeds = [-1]", "seeds must be 0 to 2**62 - 1, not -1"),
    ],
)
def test_the_top_of_the_file(write: Write, content: str | bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(UsageError) as refused:
        read_sweep(path)
    assert str(refused.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            "[settings]\ngroup-sise = 64",
            "settings.group-sise is not an option of quantize; did you mean group-size",
        ),
        (
            "[settings]\nxyz = 64",
            "settings.xyz is not an option of quantize; rsq-stream quantize --help",
        ),
        ('[settings]\nbits = "two"', 'settings.bits must be a whole number, not "two"'),
        ("[settings]\nbits = true", "settings.bits must be a whole number, not true"),
        ("[settings]\nbits = 2.0", "settings.bits must be a whole number, not 2.0"),
        ("[settings]\nbits = 1999-01-01", "settings.bits must be a whole number, not"),
        ("[settings]\nrefit = 1", "settings.refit must be true or false, not 1"),
        (
            "[settings]\noverride = [1]",
            "settings.override must be a string or a list of them, not [1]",
        ),
        ("[settings]\nrefit = true\nno-refit = true", "settings.no-refit says again"),
        ("[settings]\nseed = 1", "settings.seed has no place here: seeds ="),
        ("[settings]\noutput = 'x'", "settings.output has no place here"),
        ("[grid]\nthreads = [1]", "grid.threads decides no result, it goes under"),
        ("[grid]", "grid is empty: give options with lists, as bits = [2, 3]"),
        ("[grid]\nbits = []", "grid.bits must be a list of values, not []"),
        ("[grid]\nbits = 2", "grid.bits must be a list of values, not 2"),
        ("[grid]\nbits = [2, '3']", 'grid.bits must be a whole number, not "3"'),
        ("[grid]\nbits = [2, 2]", "grid.bits holds 2 more than once"),
        ("[grid]\nsymmetric = [true]\nasymmetric = [true]", "grid.asymmetric says"),
        ("[[run]]\nbits = 2", "run 1.name must be a line of text, not nothing"),
        ('[[run]]\nname = "a\\nb"', 'run 1.name must be a line of text, not "a'),
        ("[[run]]\nname = 'a'\n[[run]]\nname = 'a'", 'run 2.name is "a", as another'),
        ("[[run]]\nname = 'a'\nbit = 2", "run 1.bit is not an option of quantize; did"),
        (
            "[eval]\nmax-window = 2",
            "eval.max-window is not an option of a sweep's eval; did you mean max-w",
        ),
        ("[eval]\nsequence-length = 1", "eval.sequence-length must be 2 or more"),
        ("[eval]\nbos = 1", "eval.bos must be true or false, not 1"),
    ],
)
def test_the_tables_of_the_file(write: Write, tables: str, message: str) -> None:
    path = write(TOP + tables)
    with pytest.raises(UsageError) as refused:
        read_sweep(path)
    assert str(refused.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TOP.replace(str(MODEL), "nowhere"), "model: nowhere: no such folder"),
        (TOP.replace("text.txt", "no.txt"), "text {0}/no.txt: no such file"),
        (TOP.replace("text.txt", "s.toml"), "text {0}/s.toml: must end in one of"),
        (TOP + "calibration = 'no.txt'", "settings: --calibration {0}/no.txt: no such"),
        (TOP + "[settings]\npreset = 'x'", "settings: --preset must be one of"),
        (TOP + "[grid]\nbits = [2, 9]", "bits=9: --bits must be 2 to 8, not 9"),
        (
            TOP + "[grid]\nmethod = ['gptq', 'gtpq']",
            "method=gtpq: --method must be one",
        ),
        (TOP + "[[run]]\nname = 'a'\ndamping = 2", "a: --damping must be above 0, at"),
        (TOP + "[eval]\nsequence-length = 9999", "text {0}/text.txt: 990 tokens, but"),
        (
            TOP + "[settings]\nbits = 2\n[[run]]\nname = 'a'\nbpw = 8",
            "a: --bpw chooses the bits: leave --bits out",
        ),
        (
            TOP + "[grid]\nbits = [2]\n[[run]]\nname = 'bits=2'",
            'a run is named "bits=2", as a row of the grid is',
        ),
    ],
)
def test_every_run_is_checked_first(write: Write, content: str, message: str) -> None:
    path = write(content if "[" in content else content + "\n[settings]\n")
    with pytest.raises(UsageError) as refused:
        check_all(path)
    wanted = message.format(path.parent)
    assert str(refused.value).startswith(f"{path}: {wanted}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.toml: no such file"):
        read_sweep(tmp_path / "no.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_sweep(tmp_path)


def test_rows_are_the_product_of_the_grid_then_the_runs(write: Write) -> None:
    path = write(
        TOP + "calibration = 'text.txt'\nseeds = [0, 7]\n"
        "[settings]\ngroup-size = 64\nasymmetric = true\nbits = 4\n"
        "[grid]\nbits = [2, 3]\nno-refit = [true, false]\n"
        "[[run]]\nname = 'own'\nsymmetric = true\noverride = 'down_proj=8'\n"
        "[[run]]\nname = 'paper'\npreset = 'rsq-paper'\n"
        "[eval]\nbos = true\n"
    )
    sweep = read_sweep(path)
    rows = {row.name: row.job for row in rows_of(sweep)}
    assert list(rows) == [
        "bits=2 no-refit=true",
        "bits=2 no-refit=false",
        "bits=3 no-refit=true",
        "bits=3 no-refit=false",
        "own",
        "paper",
    ]
    usual = QuantizeOptions(
        calibration=str(path.parent / "text.txt"),
        group_size=64,
        symmetric=False,
        bits=4,
    )
    first = dataclasses.replace(usual, bits=2, refit=False)
    assert rows["bits=2 no-refit=true"] == first
    assert rows["bits=3 no-refit=false"] == dataclasses.replace(
        usual, bits=3, refit=True
    )
    own = dataclasses.replace(usual, symmetric=True, override=["down_proj=8"])
    assert rows["own"] == own
    # What the file gives wins over the preset, what it leaves out is the preset's.
    paper = rows["paper"]
    assert (paper.bits, paper.group_size, paper.clip_exponent) == (4, 64, 2.4)
    assert sweep.seeds == (0, 7)
    assert sweep.evaluation == EvalOptions(bos=True)


def test_a_file_that_compares_nothing_has_one_row(write: Write) -> None:
    [row] = rows_of(read_sweep(write(TOP)))
    assert (row.name, row.job) == ("settings", QuantizeOptions())
    only = rows_of(read_sweep(write(TOP + "[[run]]\nname = 'a'\n")))
    assert [row.name for row in only] == ["a"]


def test_a_key_follows_what_decides_the_result_alone(write: Write) -> None:
    [usual] = runs_in(write(TOP + CHECKED))
    same = (
        TOP + CHECKED + "bits = 4\nthreads = 3\nbatch = 2\n",  # a default, and speed
        TOP + CHECKED + "[[run]]\nname = 'renamed'\n",
        TOP + CHECKED + "[eval]\nsequence-length = 512\n",  # the model's limit
    )
    for content in same:
        assert [run.key for run in runs_in(write(content))] == [usual.key]
    other = (
        TOP + CHECKED + "bits = 3\n",
        TOP + "seeds = [1]\n" + CHECKED,
        TOP + CHECKED + "[eval]\nmax-windows = 1\n",
        TOP + CHECKED + "[eval]\nbos = true\n",
        TOP + CHECKED.replace("'text.txt'", "'wikitext2'"),
    )
    keys = [usual.key]
    for content in other:
        [run] = runs_in(write(content))
        keys.append(run.key)
    path = write(TOP + CHECKED)
    (path.parent / "text.txt").write_text("another text")
    keys.append(runs_in(path)[0].key)
    assert len(set(keys)) == len(keys)


def test_a_key_is_that_of_the_seed_and_the_model(write: Write) -> None:
    path = write(TOP + "seeds = [0, 1]\n" + CHECKED)
    sweep = read_sweep(path)
    planned = plan_rows(sweep, rows_of(sweep), "cpu")
    evaluation = evaluation_of(sweep, planned)
    runs = [
        run
        for model in ("one", "other")
        for run in runs_of(sweep, planned, evaluation, {None: model})
    ]
    assert len({run.key for run in runs}) == 4
    assert [run.job.seed for run in runs] == [0, 1, 0, 1]
    assert json.dumps([run.label for run in runs[:2]]) == (
        '["settings, seed 0", "settings, seed 1"]'
    )
