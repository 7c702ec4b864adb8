"""Options, each declared once; the signatures of the commands name them.

What ``quantize`` and ``plan`` alone share is in ``quantize_options.py``. Values are
checked where they are used, so that a bad one is the library's one line.
"""

from pathlib import Path
from typing import Annotated

import typer

PLACE_PANEL = "Place and speed (may change on resume)"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with safetensors, or a Hugging Face id.",
        show_default=False,
    ),
]
WorkDir = Annotated[
    Path, typer.Argument(metavar="WORKDIR", help="The work folder of a run.")
]
OutputFolder = Annotated[
    Path, typer.Argument(metavar="OUTPUT", help="A folder that quantize made.")
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no notices.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda",
        help="Where to compute.",
        show_default="cuda if present",
        rich_help_panel=PLACE_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Units computed side by side on the CPU.",
        show_default="the cores there are",
        rich_help_panel=PLACE_PANEL,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show the plan, stop.")
]
AllLinears = Annotated[
    bool, typer.Option("--all", help="List every linear, not the worst ten.")
]
Text = Annotated[
    str,
    typer.Option(
        "--text", metavar="FILE", help="A .txt, .jsonl or .parquet file to predict."
    ),
]
WindowLength = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        metavar="TOKENS",
        help="Tokens per window.",
        show_default="2048, or the model's limit",
    ),
]
MaxWindows = Annotated[
    int | None,
    typer.Option(
        "--max-windows", metavar="N", help="Stop after N windows.", show_default="all"
    ),
]
Bos = Annotated[
    bool, typer.Option("--bos/--no-bos", help="Begin each window with the BOS token.")
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="Also measure KL(this model || the evaluated one).",
        show_default=False,
    ),
]
VerifyAgainst = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        help="Also measure each linear's distance from this source.",
        show_default=False,
    ),
]
Sample = Annotated[
    str | None,
    typer.Option(
        "--sample", metavar="PROMPT", help="Continue a prompt.", show_default=False
    ),
]
SampleTokens = Annotated[
    int, typer.Option("--sample-tokens", metavar="N", help="Tokens of the sample.")
]
DemoBits = Annotated[
    list[int] | None,
    typer.Option(
        "--bits", metavar="2..8", help="May be repeated.", show_default="3 and 2"
    ),
]
DemoSamples = Annotated[
    int, typer.Option("--samples", metavar="N", help="Calibration windows.")
]
DemoOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Keep the quantized models here.",
        show_default="a temporary folder",
    ),
]
ProbeFolder = Annotated[
    Path, typer.Option("--work-dir", metavar="DIR", help="Measure the disk here.")
]
SweepPath = Annotated[
    Path,
    typer.Argument(
        metavar="FILE.toml", help="Names model, text, settings, grid and seeds."
    ),
]
SweepOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Where results and unfinished runs lie.",
        show_default="FILE.sweep, beside it",
    ),
]
SweepDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda",
        help="Where to compute.",
        show_default="every GPU of one kind, else cpu",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="N",
        help="Runs at a time; on the CPU they share the cores.",
        show_default="one a GPU; 1 on the CPU",
    ),
]
KeepModels = Annotated[
    bool,
    typer.Option(
        "--keep-models", help="Keep each quantized model in its run's folder."
    ),
]
ListRuns = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, list the runs, stop.")
]
