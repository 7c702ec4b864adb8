"""``rsq-stream plan``: what a run would need and make, without making it."""

from ..display.bits import as_choice, explained
from ..display.plan_table import as_object, show, warn_about_room
from ..display.progress import shown
from ..display.text import say, say_json
from ..options.common import Debug, Json, Model, Quiet
from ..options.quantize_options import QuantizeOptions
from ..options.resolve import prepare
from ..signals import StopRequest


def plan(
    model: Model,
    *,
    options: QuantizeOptions,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a run would need and make; works without the calibration text.

    With --bpw it measures first, and leaves that for quantize in the work folder.
    """
    del debug
    measures = options.bpw is not None
    made = prepare(model, options, read_calibration=measures, imagined=not measures)
    choice = None
    if options.bpw is not None:
        from rsq_stream.api import choose_bits

        with StopRequest() as stop, shown(silent=quiet or as_json) as listener:
            made, choice = choose_bits(
                made, options.bpw, listener=listener, stop=stop.event
            )
    if choice is not None and as_json:
        say_json(as_object(made) | {"bits_choice": as_choice(choice)})
    else:
        show(made, as_json=as_json)
    if choice is not None and not as_json:
        say(f"\n{explained(made, choice)}")
    if not quiet:
        warn_about_room(made)
