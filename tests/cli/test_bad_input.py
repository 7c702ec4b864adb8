"""Bad input: one line that says what, where and what to do; nothing left behind."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from rsq_stream.cli.main import main
from rsq_stream.cli.options.quantize_options import QuantizeOptions
from rsq_stream.cli.options.resolve import prepare

from rsq_stream.demo import CALIBRATION, MODEL
from rsq_stream.storage.work_folder import WorkFolder
from tests.support.cli_runs import Run

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
Refused = Callable[..., str]
SMALL = ("--samples", "2", "--sequence-length", "64", "--device", "cpu")


@dataclass(frozen=True)
class Spoiled:
    """A copy of the bundled model with one thing wrong, and the line for it."""

    id: str
    spoil: Callable[[Path], None]
    says: tuple[str, ...]


def change_config(**fields: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def cut_short(model: Path) -> None:
    content = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(content[:-1000])


def lengthen_header(model: Path) -> None:
    content = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes((2**62).to_bytes(8, "little") + content[8:])


def index_naming(shard: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        weights = {"model.norm.weight": SHARD, "model.embed_tokens.weight": shard}
        (model / INDEX).write_text(json.dumps({"weight_map": weights}))

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


SPOILED = [
    Spoiled("no-config", remove("config.json"), ("config.json is missing",)),
    Spoiled("no-shard", remove(SHARD), ("neither", "safetensors")),
    Spoiled("no-tokenizer", remove("tokenizer.json"), ("no usable tokenizer",)),
    Spoiled(
        "gpt2",
        change_config(model_type="gpt2"),
        ("model_type 'gpt2' is not supported", "llama"),
    ),
    Spoiled(
        "quantized-already",
        change_config(quantization_config={"quant_method": "gptq"}),
        ("is quantized already", "give the full-precision checkpoint"),
    ),
    Spoiled(
        "another-width",
        change_config(hidden_size=128),
        ("has shape", "but config.json makes it"),
    ),
    Spoiled("cut-short", cut_short, (SHARD, "cut short", "fetch it again")),
    Spoiled("long-header", lengthen_header, (SHARD, f"header has {2**62} bytes")),
    Spoiled(
        "missing-shard",
        index_naming("model-00002-of-00002.safetensors"),
        (INDEX, "names model-00002-of-00002.safetensors, which is missing"),
    ),
    Spoiled(
        "shard-elsewhere",
        index_naming("../elsewhere.safetensors"),
        (INDEX, "'../elsewhere.safetensors' is not a plain"),
    ),
]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must fail in one line and leave no output; gives the line."""

    def call(*arguments: object, output: Path = tmp_path / "out") -> str:
        before = contents(output)
        work_dir = output.with_name(output.name + ".work")
        had_work = work_dir.exists()
        given = [str(argument) for argument in arguments]
        if given[0] == "quantize":
            given += ["--output", str(output)]
        with pytest.raises(SystemExit) as stopped:
            main(given)
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert "please report" not in err
        assert contents(output) == before
        assert work_dir.exists() == had_work
        return err

    return call


def contents(folder: Path) -> dict[str, bytes] | None:
    """What has its final name in a folder; None where there is none."""
    if not folder.is_dir():
        return None
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if not file.name.endswith(".partial")
    }


def with_text(*options: object) -> tuple[object, ...]:
    return ("quantize", MODEL, "--calibration", CALIBRATION, *SMALL, *options)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in SPOILED])
def test_a_spoiled_source(case: Spoiled, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    case.spoil(model)
    line = refused("quantize", model, "--calibration", CALIBRATION, *SMALL)
    assert str(model) in line
    for part in case.says:
        assert part in line


def test_no_such_folder(refused: Refused) -> None:
    line = refused("quantize", "/nowhere/at/all", "--calibration", CALIBRATION)
    assert "/nowhere/at/all: no such folder, and not a hub id" in line


def test_an_output_without_a_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The present folder has one, and its work folder lies beside it."""
    code, _, err = run("plan", MODEL, "--output", "/")
    assert (code, err) == (1, "error: --output /: must be a folder of its own\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = run("plan", MODEL, "--output", ".", "--method", "rtn")
    assert code == 0, err
    assert re.search(rf"work folder +{re.escape(str(tmp_path))}\.work\n", out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "0"), "--bits must be 2 to 8, not 0"),
        (("--bits", "1"), "--bits must be 2 to 8, not 1"),
        (
            ("--importance", "first-n", "--importance-tokens", "0"),
            "--importance-tokens must be 1 to the sequence length (64), not 0",
        ),
        (("--ram", "9" * 400 + "g"), "--ram must be a size such as 8GiB"),
        (("--revision", "main"), "--revision is for a hub id, and "),
        (("--bits", "9"), "--bits must be 2 to 8, not 9"),
        (("--group-size", "100"), "--group-size must be 32, 64, 128, -1, not 100"),
        (
            ("--method", "awq"),
            "--method must be one of rsq, quarot, gptq, rtn, rotate, not awq",
        ),
        (
            ("--rotation", "fully"),
            "--rotation must be one of portable, full, none, not fully",
        ),
        (("--samples", "0"), "--samples must be 1 or more, not 0"),
        (("--sequence-length", "1"), "--sequence-length must be 2 or more, not 1"),
        (("--expand", "65"), "--expand must be 1 to the sequence length (64), not 65"),
        (("--damping", "0"), "--damping must be above 0"),
        (("--importance", "none"), "--importance must be one of"),
        (("--importance-min", "2"), "--importance-min must be 0 to importance-max"),
        (("--threads", "0"), "must be 1 to 1024, not 0"),
        (("--batch", "-1"), "--batch must be 0 (automatic) to 4096, not -1"),
        (("--device", "tpu"), "--device must be one of cpu"),
        (("--ram", "some"), "--ram must be a size such as 8GiB, 500MB or 2g"),
        (("--ram", "1MiB"), "is too little: this model needs"),
        (("--vram", "8GiB"), "--vram is for a GPU, and this run computes on the CPU"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, tuple) else "",
)
def test_a_bad_option(options: tuple[str, ...], says: str, refused: Refused) -> None:
    assert says in refused(*with_text(*options))


def test_text_shorter_than_one_window(refused: Refused, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def short(): pass\n")
    line = refused("quantize", MODEL, "--calibration", text, *SMALL)
    assert "one window needs 64" in line
    assert "give more text or a smaller --sequence-length" in line


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.pdf", "x", "must end in .txt, .jsonl or .parquet"),
        ("text.jsonl", "{}", "cannot be read as .jsonl"),
        ("text.parquet", "x", "cannot be read as .parquet"),
    ],
)
def test_text_that_is_none(
    name: str, content: str, says: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    line = refused("quantize", MODEL, "--calibration", tmp_path / name, *SMALL)
    assert says in line


def test_unknown_data_set(refused: Refused) -> None:
    line = refused("quantize", MODEL, "--calibration", "pile", *SMALL)
    assert "--calibration pile: no such file, and not one of wikitext2, c4" in line


def test_data_set_while_offline(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline(monkeypatch, tmp_path)
    line = refused("quantize", MODEL, *SMALL)
    assert "--calibration wikitext2: the hub cannot be reached" in line
    assert "give a text with --calibration FILE" in line


def test_hub_model_while_offline(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline(monkeypatch, tmp_path)
    line = refused("quantize", "nobody/nothing", "--calibration", CALIBRATION)
    assert "nobody/nothing: no such folder here, the hub cannot be reached" in line


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """What HF_HUB_OFFLINE=1 and an empty cache do, after the import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))


def test_output_folder_is_not_empty(refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "full"
    output.mkdir()
    (output / "letter.txt").write_text("keep me")
    line = refused(*with_text(), output=output)
    assert "must be new or empty, it holds letter.txt" in line
    line = refused(*with_text("--restart"), output=output)
    assert "must be new or empty, it holds letter.txt" in line


def test_output_is_a_file(refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("keep me")
    assert "is a file; give a folder" in refused(*with_text(), output=output)
    assert output.read_text() == "keep me"


def test_work_folder_of_another_plan(refused: Refused, tmp_path: Path) -> None:
    job = QuantizeOptions(
        bits=3, seed=1, calibration=str(CALIBRATION), output=tmp_path / "out"
    )
    made = prepare(str(MODEL), job, read_calibration=True)
    plan, work_dir = made.plan, made.options.work_dir
    with WorkFolder(work_dir) as folder:
        folder.open_journal(plan.canonical_json(), plan.sha256)
    line = refused(*with_text("--bits", "4"))
    assert f"{work_dir}: holds an unfinished run of another plan" in line
    assert "bits was 3 and is now 4" in line
    assert "seed was 1 and is now 0" in line
    assert "--restart starts over" in line


def test_status_where_no_run_is(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path}: no run here" in refused("status", tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "missing"),
        ("{", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        ("{}", "lacks what this tool writes there"),
    ],
)
def test_inspect_of_no_output(
    content: str | None, says: str, refused: Refused, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "rsq_stream.json").write_text(content)
    assert says in refused("inspect", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--text", "/nowhere.txt"), "--text /nowhere.txt: no such file"),
        (("--text", MODEL / "config.json"), "must end in one of .txt"),
        (("--text", CALIBRATION, "--max-windows", "0"), "--max-windows must be 1"),
        (("--text", CALIBRATION, "--device", "tpu"), "--device must be one of cpu"),
    ],
    ids=["absent", "json", "no-windows", "no-device"],
)
def test_eval_of_nothing(
    options: tuple[object, ...], says: str, refused: Refused
) -> None:
    assert says in refused("eval", MODEL, *options)
