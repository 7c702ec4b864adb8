"""The documents name what is there, and the examples of CONTRIBUTING run."""

import re
from pathlib import Path

import pytest
import torch
from rsq_stream.cli.display.text import say
from rsq_stream.cli.main import COMMANDS
from rsq_stream.cli.options.common import Debug, OutputFolder

from rsq_stream.calibration import text
from rsq_stream.calibration.text import DATA_SETS, DataSet, read_text
from tests.support.cli_runs import Run
from tests.support.toy import plan_toy, toy_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LETTERS = DataSet(
    "someone/letters",
    "train.jsonl",
    "0123456789abcdef0123456789abcdef01234567",
    shuffled=False,
)


def card(output: OutputFolder, *, debug: Debug = False) -> None:
    """Show the model card of an output."""
    del debug
    say((output / "README.md").read_text())


def test_a_data_set_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')

    def fetched(repo: str, file: str, *, revision: str, repo_type: str) -> str:
        assert (repo, revision) == (LETTERS.repo, LETTERS.revision)
        assert repo_type == "dataset"
        return str(tmp_path / file)

    monkeypatch.setattr(text, "hf_hub_download", fetched)
    monkeypatch.setitem(DATA_SETS, "letters", LETTERS)
    assert read_text("letters", 0) == "abc\n\nde"
    toy = toy_checkpoint(tmp_path / "toy", dtype=torch.bfloat16)
    plan, _ = plan_toy(toy, calibration="letters")
    assert plan.calibration == "letters"


def test_a_command_is_a_function_and_a_row(
    run: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "card", card)
    code, out, err = run("card", quantized)
    assert (code, err) == (0, "")
    assert out == (quantized / "README.md").read_text() + "\n"
    code, out, _ = run("--help")
    assert "Show the model card of an output." in out
    code, out, err = run("card", quantized / "absent")
    assert (code, out) == (1, "")
    assert err.startswith("error: FileNotFoundError")


def test_examples_of_contributing_are_in_the_tests() -> None:
    """Paragraph by paragraph, so that a part of a long entry may be shown."""
    tests = [file.read_text() for file in (ROOT / "tests").rglob("*.py")]
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    assert blocks
    for paragraph in "\n".join(blocks).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        example = "\n".join(line for line in lines if not line.startswith("# "))
        assert any(example in test for test in tests), example


@pytest.mark.parametrize(
    "document", ["CONTRIBUTING.md", "README.md", "kernels/README.md"]
)
def test_documents_name_files_that_are_there(document: str) -> None:
    named = set(
        re.findall(r"`([\w/]+\.(?:py|cu|md|h|toml))`", (ROOT / document).read_text())
    )
    roots = ROOT, ROOT / "rsq_stream", (ROOT / document).parent
    real = {name for name in named if "NAME" not in name}
    assert real
    assert [n for n in sorted(real) if not any((r / n).is_file() for r in roots)] == []


def test_contributing_lists_the_rooms() -> None:
    listed = re.findall(r"^([a-z]+)/ ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    rooms = {path.parent.name for path in (ROOT / "rsq_stream").glob("*/__init__.py")}
    assert set(listed) == rooms
    assert len(listed) == len(rooms)
