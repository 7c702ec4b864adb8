"""How an option is declared: its panel, metavar and default, in one line."""

from typing import Any

import typer


def value(panel: str, name: str, metavar: str, text: str, default: Any = True) -> Any:
    """Declare an option; ``default`` says in words what None stands for."""
    return typer.Option(
        name, metavar=metavar, help=text, show_default=default, rich_help_panel=panel
    )


def flag(panel: str, name: str, text: str, default: Any = True) -> Any:
    """Declare a switch."""
    return typer.Option(name, help=text, show_default=default, rich_help_panel=panel)
