"""Budgets that are kept: runs under ``--ram`` and a hard limit, twice as large each.

    python benchmarks/budgets.py [--cases narrow 8B blocks] [--scale 1.0] [--soft]
        [--mapped]

- narrow: a block of width 256, MLP 768, with 16 M and 32 M tokens, within 2 GiB. Three
  slots of 8.6 and 17 GB go to the disk of TMPDIR.
- 8B: a block of that shape with 16 k and 32 k tokens, within 3 GiB, on one thread: the
  peaks of two fall together by chance, and in a longer run more likely. With more
  memory what else may stay there takes what is left over, and the longer run has more.
- blocks: 8 and 32 blocks of 4 M parameters, within 1 GiB.

``--scale`` makes calibration sets shorter. Each run is one of ``benchmarks/shapes.py``,
which says what is measured and what the hard limit is; ``--soft`` does without that.
With ``--mapped`` glibc maps each tensor by itself: what its heap keeps between small
objects, tens of MiB that differ from run to run, is then left out of what is measured.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two runs that differ in tokens or blocks."""

    shape: str
    method: str
    ram: str
    blocks: tuple[int, int]
    tokens: tuple[int, int]
    threads: int | None = None


CASES = {
    "narrow": Case(
        shape="narrow",
        method="gptq",
        ram="2GiB",
        blocks=(1, 1),
        tokens=(1 << 24, 1 << 25),
    ),
    "8B": Case(
        shape="8B",
        method="gptq",
        ram="3GiB",
        blocks=(1, 1),
        tokens=(1 << 14, 1 << 15),
        threads=1,
    ),
    "blocks": Case(
        shape="4M",
        method="rsq",
        ram="1GiB",
        blocks=(8, 32),
        tokens=(1 << 13, 1 << 13),
    ),
}


def measured(
    case: Case, blocks: int, tokens: int, *, hard: bool, mapped: bool
) -> dict[str, list[float]]:
    """Run once; gives planned and measured by what was."""
    options = {
        "shape": case.shape,
        "method": case.method,
        "ram": case.ram,
        "blocks": blocks,
        "samples": max(1, tokens // LENGTH),
        "sequence-length": LENGTH,
    } | ({} if case.threads is None else {"threads": case.threads})
    given = [part for name, x in options.items() for part in (f"--{name}", str(x))]
    program = str(Path(__file__).with_name("shapes.py"))
    made = subprocess.run(
        [sys.executable, program, *given, *["--hard"][: int(hard)], "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | (MAPPED if mapped else {}),
    )
    if made.returncode:
        sys.exit(f"{case.shape}, {blocks} blocks, {tokens} tokens: failed")
    found: dict[str, list[float]] = json.loads(made.stdout)
    return found


def main() -> None:
    """Run the cases, print a line for each run and the growth of each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--soft", action="store_true", help="no hard limit")
    parser.add_argument("--mapped", action="store_true", help="the heap left out")
    given = parser.parse_args()
    print(
        "| shape | blocks | tokens | --ram | planned, MiB | VmHWM, MiB | RssAnon, MiB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    growth = []
    for name in given.cases:
        case, peaks = CASES[name], []
        for blocks, whole in zip(case.blocks, case.tokens, strict=True):
            tokens = int(whole * given.scale) // LENGTH * LENGTH
            found = measured(
                case, blocks, tokens, hard=not given.soft, mapped=given.mapped
            )
            planned, resident = found["host memory"]
            (anonymous,) = found["anonymous"]
            sizes = " | ".join(f"{x / MIB:.1f}" for x in (planned, resident, anonymous))
            print(f"| {case.shape} | {blocks} | {tokens} | {case.ram} | {sizes} |")
            sys.stdout.flush()
            peaks.append(resident)
        added = (peaks[1] - peaks[0]) / MIB
        more = case.blocks[1] - case.blocks[0]
        each = f", {added / more:.2f} a block" if more else ""
        share = peaks[1] / peaks[0] - 1
        growth.append(f"{name}: {added:+.1f} MiB, {share:+.2%}{each}")
    print("\n" + "\n".join(growth))


if __name__ == "__main__":
    main()
