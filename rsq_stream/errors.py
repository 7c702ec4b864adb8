"""Everything that can go wrong, as one tree.

::

    RsqError
    ├── UsageError (ValueError)         an option is out of bounds
    ├── CheckpointError (ValueError)    the source folder, its shards or its config
    │   └── UnsupportedModelError       a family or shape this tool does not know
    ├── CalibrationError (ValueError)   the calibration text cannot give the windows
    ├── PlanMismatchError (ValueError)  a run exists here, made with another plan
    ├── OutputError (OSError)           the output folder, or what is in it
    ├── ScratchError (OSError)          the work folder: journal, activations, disk
    │   └── DiskFullError               no room left; the run goes on once there is
    ├── DamagedError (OSError)          bytes on disk are not those that were written
    ├── KernelError (RuntimeError)      a compiled kernel refused its arguments
    ├── BudgetError (MemoryError)       the stated memory cannot hold the work
    ├── NumericalError (ArithmeticError)  NaN or infinity in the activations
    └── Interrupted (RuntimeError)      stopped at a safe point; resumable

Each message says what, where, wanted, got, and what to do, in one line.
"""


class RsqError(Exception):
    """Base of every error that this tool raises on purpose."""


class UsageError(RsqError, ValueError):
    """An option or plan field is out of bounds."""


class CheckpointError(RsqError, ValueError):
    """The source checkpoint cannot be read as it stands."""


class UnsupportedModelError(CheckpointError):
    """The source is sound, but of a family or shape that is not supported."""


class CalibrationError(RsqError, ValueError):
    """The calibration text cannot give the windows that were asked for."""


class PlanMismatchError(RsqError, ValueError):
    """The work folder holds an unfinished run of another plan."""


class OutputError(RsqError, OSError):
    """The output folder cannot be written, or its content is not what it says."""


class ScratchError(RsqError, OSError):
    """The work folder failed: journal, activation cache or free space."""


class DiskFullError(ScratchError):
    """A disk has no room left; nothing that was finished is lost."""


class DamagedError(RsqError, OSError):
    """Bytes that this run wrote are not what they were."""

    def __init__(self, what: str, part: str = "") -> None:
        super().__init__(f"{what}; --restart starts the run over")
        self.what = what
        self.part = part
        """An activation slot, a file of the work folder, or a tensor of the output."""


class KernelError(RsqError, RuntimeError):
    """A compiled kernel was given arguments that it cannot take."""


class BudgetError(RsqError, MemoryError):
    """The stated memory cannot hold the smallest unit of work."""


class NumericalError(RsqError, ArithmeticError):
    """NaN or infinity appeared in activations, or in what is made of them."""


class Interrupted(RsqError, RuntimeError):  # noqa: N818  the word users know
    """The run was asked to stop and did so at a safe point."""


def require(holds: bool, option: str, got: object, wanted: str) -> None:
    """Refuse a setting that is out of bounds, by the name of its option.

    Raises
    ------
    UsageError
        It does not hold.
    """
    if not holds:
        raise UsageError(f"--{option} must be {wanted}, not {got}")


def one_of(names: tuple[str, ...]) -> str:
    """Say what a setting may be."""
    return "one of " + ", ".join(names)
