"""``--preset``: many options at once; those given beside it win."""

from collections.abc import Callable, Mapping
from typing import Any

from rsq_stream.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    # The choices of RSQ's released scripts (arXiv 2503.01820, run_rsq.sh); blocks of
    # 128 columns and the 80 steps of the clip search are this tool's anyway.
    "rsq-paper": {
        "method": "rsq",
        "rotation": "full",
        "bits": 3,
        "group_size": -1,
        "symmetric": True,
        "signed_scales": False,
        "clip_exponent": 2.4,
        "damping": 0.01,
        "shrinkage": 0.0,
        "importance": "attncon",
        "importance_min": 0.005,
        "importance_max": 1.0,
        "importance_exact": True,
        "samples": 256,
        "propagate": 0.0,
        "sweeps": 0,
        "refit": False,
    },
}


def with_preset(
    given: Mapping[str, Any], is_given: Callable[[str], bool]
) -> dict[str, Any]:
    """Return the options with those of the preset where the command line names none.

    Raises
    ------
    UsageError
        There is no such preset.
    """
    name = given["preset"]
    if name is None:
        return dict(given)
    if name not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, not {name}")
    chosen = {
        option: value
        for option, value in PRESETS[name].items()
        if not is_given(option) and not (option == "bits" and is_given("bpw"))
    }
    return {**given, **chosen}
