"""How a folder is served: what its run was calibrated for, its evaluation simulates."""

import json

from rsq_stream.checkpoint.shards import Checkpoint
from rsq_stream.config.activations import NOTHING, ActivationScheme
from rsq_stream.errors import OutputError

MANIFEST = "rsq_stream.json"
SEAL = "rsq_stream.sha256"


_LARGEST_MANIFEST_BYTES = 500_000_000


def served_scheme(checkpoint: Checkpoint) -> ActivationScheme:
    """Give the activations that a folder's plan names; of a source, none is rounded.

    Raises
    ------
    OutputError
        The folder's manifest is damaged.
    """
    files = checkpoint.files
    if not files.exists(MANIFEST):
        return NOTHING
    path = files.path(MANIFEST)
    if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
        raise OutputError(f"{path}: larger than any file of its kind")
    try:
        plan = dict(json.loads(path.read_bytes())["plan"])
        return ActivationScheme.from_fields(plan)
    except (LookupError, TypeError, ValueError) as error:
        raise OutputError(
            f"{path}: does not say how activations are served"
            f" ({type(error).__name__}: {error}); it is damaged or of another version"
        ) from error
