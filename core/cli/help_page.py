"""docs/help.md: `--help` of every command, so that the page cannot drift from the program.

python -m holdfast.cli.help_page > docs/help.md
"""

from __future__ import annotations

import click

from holdfast.cli import cli

WIDTH = 100


def help_page() -> str:
    """The page as Markdown."""
    parts = ["# Commands\n\nGenerated from `holdfast --help`; a test compares them.\n"]
    # the settings under which the program runs: click keeps the help option that it made first
    group = click.Context(
        cli,
        info_name="holdfast",
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **cli.context_settings,
    )
    parts.append(_section("holdfast", cli.get_help(group)))
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command is not None
        context = click.Context(
            command, info_name=name, parent=group, terminal_width=WIDTH, max_content_width=WIDTH
        )
        parts.append(_section(f"holdfast {name}", command.get_help(context)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    print(help_page(), end="")
