"""Hardware-aware mixed-precision quantization: a bit width for every layer, with the hardware as judge.

    haq search --hw edge   find bits under a hardware budget
    haq report RUN         show what was found on one page

`haq X` is `python -m haq.X`. Each command has its own --help.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import tokenize
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from haq.console.commands import Command, Group, call, command, summary_of
from haq.console.errors import run_command
from haq.console.options import COMMON, Option, argument, verbosity_options
from haq.console.values import ChoiceType
from haq.version import __version__

# By heading: a command's name, and the module that has it as `cli`. A module is imported when its command is called or its
# own help is shown.
COMMANDS = {
    "Find a policy": {"search": "haq.search", "sweep": "haq.sweep", "pretrain": "haq.pretrain"},
    "Use what was found": {
        "finetune": "haq.finetune",
        "evaluate": "haq.evaluate",
        "robustness": "haq.robustness",
        "deploy": "haq.deploy",
    },
    "Look at it": {"report": "haq.report", "runs": "haq.runs", "bench": "haq.bench"},
    "What there is": {
        "list": "haq.list",
        "hardware": "haq.hardware",
        "data": "haq.data.__main__",
        "train": "haq.train",
    },
}
MODULES = {name: module for commands in COMMANDS.values() for name, module in commands.items()}
# What can be written in place of `haq list KIND`.
LISTED = (
    *("networks", "solvers", "schemes", "criteria", "objectives", "attacks", "targets", "exporters", "hardware-models"),
    "methods",
)
VARIABLE = "_HAQ_COMPLETE"  # by which a shell asks for completions


class LazyGroup(Group):
    """The group of all commands, which knows their names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of all commands."""
        return [*MODULES, *self.commands]

    def known_words(self, ctx: click.Context) -> list[str]:
        """List what can be written after `haq`."""
        return [*self.list_commands(ctx), *LISTED]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
        if cmd_name not in MODULES:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(MODULES[cmd_name])
        found: Any = getattr(module, "cli", None)
        if isinstance(found, click.Command):
            return found
        return _passed_on(cmd_name, module)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first word; `haq networks` is `haq list networks`."""
        if args[0] in LISTED:
            args = ["list", *args]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings, with a line each."""
        width = max(len(name) for name in MODULES)
        others = {name: found.get_short_help_str(200) for name, found in self.commands.items()}
        for heading, modules in COMMANDS.items():
            rows = [(name.ljust(width), summary(module)) for name, module in modules.items()]
            if heading == list(COMMANDS)[-1]:
                rows += [(name.ljust(width), line) for name, line in others.items()]
            with formatter.section(heading):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """List the commands that begin with what was typed."""
        lines = {name: summary(module) for name, module in MODULES.items()}
        names = [*lines, *self.commands, *LISTED]
        found = [CompletionItem(name, help=lines.get(name)) for name in names if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


def summary(module: str) -> str:
    """Read the first sentence of a module's docstring; the module isn't imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    with tokenize.open(spec.origin) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.STRING:
                return summary_of(ast.literal_eval(token.string))
    return ""


def _passed_on(name: str, module: Any) -> click.Command:
    """A command that takes its words as they are to the `main` of its module."""

    def pass_on(words: Sequence[str]) -> int:
        status: int = module.main(list(words))
        return status

    arguments: list[click.Parameter] = [click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)]
    settings = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    return Command(name, callback=pass_on, params=arguments, add_help_option=False, context_settings=settings)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print(f"haq {__version__}")
        ctx.exit()


def _show_help() -> int:
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        print(context.get_help())
    return 0


_VERSION = Option(
    ["--version"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    group=COMMON,
    help="print the version",
)

cli = LazyGroup(
    "haq",
    __doc__,
    params=[_VERSION, *verbosity_options()],
    callback=_show_help,
    invoke_without_command=True,
    examples=("haq search --hw edge --budget 0.5", "haq networks --like mobilenet"),
)


@command(
    "completion",
    """Print the script that lets a shell complete commands, options and names.

    It is for the file that the shell reads when it starts.
    """,
    examples=('eval "$(haq completion bash)"', "haq completion fish > ~/.config/fish/completions/haq.fish"),
)
@argument("shell", ChoiceType(("bash", "zsh", "fish")), "the shell")
def completion(shell: str) -> int:
    """Print the script for a shell."""
    found = get_completion_class(shell)
    assert found is not None
    print(found(cli, {}, "haq", VARIABLE).source())
    return 0


cli.add_command(completion)


def main(arguments: list[str] | None = None) -> int:
    """Call the command that the words name, and return its exit status."""
    instruction = os.environ.get(VARIABLE)
    if instruction:
        return shell_complete(cli, {}, "haq", VARIABLE, instruction)
    return call(cli, arguments, "haq")


def run() -> int:
    """Run the console script; errors are one sentence on stderr."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
