"""Text -> windows -> rolled copies, and what is said of text that will not do."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from rsq_stream.calibration import long_text as tokens
from rsq_stream.calibration import text as calibration
from rsq_stream.calibration.text import DATA_SETS, read_text
from rsq_stream.calibration.tokenizer import load_tokenizer
from rsq_stream.calibration.windows import Windows, choose_windows
from rsq_stream.demo import CALIBRATION, MODEL
from rsq_stream.errors import CalibrationError, CheckpointError
from tests.support.toy import toy_tokenizer, toy_windows

TEXT = "".join(chr(33 + place % 89) for place in range(1000))
DOCUMENTS = ["The first.", "Zwei\nZeilen", "troisième ✓"]


def windows_of(text: str, samples: int, length: int, seed: int) -> list[list[int]]:
    tokenizer = toy_tokenizer()
    chosen = choose_windows(
        text,
        tokenizer,
        samples=samples,
        sequence_length=length,
        seed=seed,
        where="text.txt",
    )
    assert chosen.dtype == torch.int32
    assert chosen.shape == (samples, length)
    rows: list[list[int]] = chosen.tolist()
    return rows


def test_windows_are_runs_of_the_text_by_the_seed() -> None:
    stream = [2, *map(ord, TEXT)]
    runs = [stream[start : start + 25] for start in range(len(stream) - 24)]
    rows = windows_of(TEXT, 30, 25, 0)
    assert all(row in runs for row in rows)
    assert len({tuple(row) for row in rows}) > 20
    assert windows_of(TEXT, 30, 25, 0) == rows
    assert windows_of(TEXT, 10, 25, 0) == rows[:10]
    assert windows_of(TEXT, 30, 25, 1) != rows


def test_all_starts_are_possible() -> None:
    rows = windows_of("abcde", 200, 4, 0)
    assert {tuple(row) for row in rows} == {
        (2, *map(ord, "abc")),
        tuple(map(ord, "abcd")),
        tuple(map(ord, "bcde")),
    }


def test_a_text_of_one_window_gives_that_window() -> None:
    assert windows_of("abc", 3, 4, 7) == [[2, 97, 98, 99]] * 3


@pytest.mark.parametrize(("text", "tokens"), [("ab", 3), ("", 1)])
def test_a_text_that_is_too_short_is_refused(text: str, tokens: int) -> None:
    message = (
        rf"^text.txt: {tokens} tokens, but one window needs 4; give more text or a"
        r" smaller --sequence-length$"
    )
    with pytest.raises(CalibrationError, match=message):
        windows_of(text, 1, 4, 0)


def test_expansion_rolls_to_the_right() -> None:
    windows = Windows(torch.tensor([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 6, 5, 4, 3]]), 3)
    assert windows.sequences == 6
    assert windows.tokens(0, 6).tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [5, 6, 0, 1, 2, 3, 4],
        [3, 4, 5, 6, 0, 1, 2],
        [7, 8, 9, 6, 5, 4, 3],
        [4, 3, 7, 8, 9, 6, 5],
        [6, 5, 4, 3, 7, 8, 9],
    ]


@pytest.mark.parametrize("expand", [1, 4, 10])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_units_of_any_size_give_the_same_sequences(expand: int, count: int) -> None:
    windows = Windows(toy_windows(50, 5, 10, 0).window_BT, expand)
    units = [windows.tokens(at, count) for at in range(0, windows.sequences, count)]
    assert torch.equal(torch.cat(units), windows.tokens(0, windows.sequences))
    assert torch.equal(torch.cat(units)[::expand], windows.window_BT)


def test_the_hash_is_of_tokens_shape_and_expansion() -> None:
    tokens = torch.arange(12)
    made = [
        Windows(tokens.view(3, 4), 1),
        Windows(tokens.view(4, 3), 1),
        Windows(tokens.view(3, 4), 2),
        Windows(tokens.view(3, 4).flip(0), 1),
        Windows(torch.where(tokens == 11, 12, tokens).view(3, 4), 1),
    ]
    assert len({windows.sha256 for windows in made}) == len(made)
    strided = torch.stack([tokens, tokens], 1)[:, 0].view(3, 4)
    assert Windows(strided, 1).sha256 == made[0].sha256


def _written(path: Path, rows: list[Any]) -> Path:
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".txt":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"]
)
def test_documents_are_joined_by_an_empty_line(tmp_path: Path, name: str) -> None:
    rows: list[Any] = [{"text": text, "id": 1} for text in DOCUMENTS]
    path = _written(tmp_path / name, DOCUMENTS if name.endswith(".txt") else rows)
    assert read_text(str(path), 0) == "\n\n".join(DOCUMENTS)


BAD_FILES: dict[str, tuple[str, bytes]] = {
    "txt-latin1": ("a.txt", "troisième".encode("latin-1")),
    "jsonl-cut": ("a.jsonl", b'{"text": "a"}\n{"text'),
    "jsonl-latin1": ("a.jsonl", b'{"text": "\xe8"}'),
    "jsonl-no-text": ("a.jsonl", b'{"content": "a"}'),
    "jsonl-list": ("a.jsonl", b'["a"]'),
    "jsonl-number": ("a.jsonl", b'{"text": 7}'),
    "jsonl-null": ("a.jsonl", b'{"text": null}'),
    "jsonl-nested": ("a.jsonl", b"[" * 200_000),
    "gz-plain": ("a.jsonl.gz", b'{"text": "a"}'),
    "gz-cut": ("a.jsonl.gz", gzip.compress(b'{"text": "abcdefgh"}' * 9)[:-12]),
    "gz-damaged": ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 20),
    "parquet-text": ("a.parquet", b"PAR1 is how it begins"),
    "parquet-empty": ("a.parquet", b""),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    message = (
        rf"^--calibration {path}: cannot be read as {path.suffix} with a 'text' in"
        r" each row \(.+\)$"
    )
    with pytest.raises(CalibrationError, match=message) as caught:
        read_text(str(path), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows", [[{"content": "a"}], [{"text": None}, {"text": "a"}], [{"text": 7}]]
)
def test_a_parquet_file_without_text_in_each_row_is_refused(
    tmp_path: Path, rows: list[Any]
) -> None:
    path = _written(tmp_path / "a.parquet", rows)
    with pytest.raises(CalibrationError, match=r"with a 'text' in each row"):
        read_text(str(path), 0)


def test_what_is_neither_file_nor_name_is_refused(tmp_path: Path) -> None:
    message = r"^--calibration .*absent: no such file, and not one of wikitext2, c4$"
    with pytest.raises(CalibrationError, match=message):
        read_text(str(tmp_path / "absent"), 0)
    with pytest.raises(CalibrationError, match=r": no such file"):
        read_text(str(tmp_path), 0)
    (tmp_path / "a.pdf").write_bytes(b"")
    message = r"a.pdf: must end in .txt, .jsonl or .parquet$"
    with pytest.raises(CalibrationError, match=message):
        read_text(str(tmp_path / "a.pdf"), 0)


def test_data_sets_are_fetched_at_a_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"document {number}"} for number in range(20)]
    files = {
        "Salesforce/wikitext": _written(tmp_path / "a.parquet", rows),
        "allenai/c4": _written(tmp_path / "a.json.gz", rows),
    }

    def fetched(repo: str, file: str, *, revision: str, repo_type: str) -> str:
        assert any(
            (repo, file, revision) == (known.repo, known.file, known.revision)
            for known in DATA_SETS.values()
        )
        assert len(revision) == 40
        assert repo_type == "dataset"
        return str(files[repo])

    monkeypatch.setattr(calibration, "hf_hub_download", fetched)
    in_order = "\n\n".join(row["text"] for row in rows)
    assert read_text("wikitext2", 0) == read_text("wikitext2", 1) == in_order
    shuffled = read_text("c4", 0)
    assert shuffled != in_order
    assert sorted(shuffled.split("\n\n")) == sorted(in_order.split("\n\n"))
    assert read_text("c4", 0) == shuffled != read_text("c4", 1)
    monkeypatch.setattr(calibration, "_LARGEST_TEXT_CHARACTERS", 30)
    assert shuffled.startswith(read_text("c4", 0) + "\n\n")


def test_a_data_set_that_cannot_be_fetched_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("a\nb")

    monkeypatch.setattr(calibration, "hf_hub_download", offline)
    message = (
        r"^--calibration c4: the hub cannot be reached and the data set is not in its"
        r" cache; give a text with --calibration FILE$"
    )
    with pytest.raises(CalibrationError, match=message):
        read_text("c4", 0)


def test_the_tokenizer_comes_from_the_folder(tmp_path: Path) -> None:
    toy_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == [2, 97, 98]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_tokenizer_is_explained(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    message = rf"^{tmp_path}: no usable tokenizer \(.+\); calibration text needs one$"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_long_text_has_the_tokens_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer(MODEL)
    text = CALIBRATION.read_text("utf-8")[:60_000]
    text += "a line of many words, " * 500 + "\n\n\n    indented\n\n" * 200
    whole = tokenizer(text, verbose=False)["input_ids"]
    given = []

    def seen(piece: str, **options: Any) -> Any:
        given.append(len(piece))
        return tokenizer(piece, **options)

    monkeypatch.setattr(tokens, "PIECE", 1000)
    assert tokens.tokens_of(text, seen).tolist() == whole
    assert len(given) >= 70
    assert max(given) <= 1000


def test_what_comes_before_a_text_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a text in which there is nowhere to cut is cut all the same."""
    monkeypatch.setattr(tokens, "PIECE", 100)
    found = tokens.tokens_of(TEXT, toy_tokenizer())
    assert found.dtype == torch.int32
    assert found.tolist() == [2, *map(ord, TEXT)]


def test_a_long_text_takes_little_memory() -> None:
    """Beside the text itself: whole, the tokenizer takes some 150 bytes a character."""
    program = f"""
import sys
from pathlib import Path
from rsq_stream.calibration.windows import choose_windows
from rsq_stream.calibration.tokenizer import load_tokenizer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10

tokenizer = load_tokenizer(Path({str(MODEL)!r}))
text = Path({str(CALIBRATION)!r}).read_text("utf-8")
sizes = {{"samples": 1, "sequence_length": 8, "seed": 0, "where": "here"}}
choose_windows(text[:100_000], tokenizer, **sizes)
text = text * (4_000_000 // len(text))
before = peak()
choose_windows(text, tokenizer, **sizes)
sys.stdout.write(str(peak() - before))
"""
    made = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(made.stdout) < 250 << 20


def test_documents_in_random_order_until_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"document {number} " + "x" * number} for number in range(50)]
    path = _written(tmp_path / "a.jsonl.gz", rows)
    order = [row["text"] for row in rows]
    random.Random(3).shuffle(order)
    monkeypatch.setattr(calibration, "_fetched", lambda *_: path)
    monkeypatch.setattr(calibration, "_LARGEST_TEXT_CHARACTERS", 300)
    found = read_text("c4", 3).split("\n\n")
    assert found == order[: len(found)]
    assert sum(map(len, found[:-1])) <= 300 < sum(map(len, found))
