"""Commands and groups of commands, on top of click: pages of help, sentences for typos, and the function `main`.

How a command is written stands in `haq.console.options`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import click
from click.core import ParameterSource

from haq.console.options import ARGUMENTS, COMMON, TYPED, Argument, Option
from haq.console.output import VERBOSITY
from haq.console.values import TextType, did_you_mean, name_of, option_strings
from hw_models import trust

HELP = {"help_option_names": ["-h", "--help"]}
DEFINITION = re.compile(r"(\S+(?: \S+)*) {2,}(\S.*)")  # a line of a list: a term, some blanks, its meaning
COLUMN = 24  # characters of the first column of a help, at most


class Main(Protocol):
    """The function `main` of a command module."""

    def __call__(self, arguments: list[str] | None = None) -> int:
        """Call the command with the words after its name, and return its exit status."""
        ...


class Misuse(click.UsageError):
    """A wrong command line, in a whole sentence."""


class _Page(click.Command):
    """What the help of a command and of a group have in common."""

    examples: tuple[str, ...] = ()

    def make_parser(self, ctx: click.Context) -> Any:
        """Make the parser of the words; of those that were typed, it refuses an option given twice: one would be lost."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            values, left, order = parse(args)
            if ctx.obj is TYPED and not ctx.resilient_parsing:
                _check_given_once(order, ctx)
            return values, left, order

        parser.parse_args = parse_once
        return parser

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Show the help in words that begin as all others do."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.help = "show this page"
        return found

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the docstring: paragraphs are wrapped, and lines of a term, some blanks and its meaning are a list."""
        for block in textwrap.dedent(self.help or "").strip().split("\n\n"):
            rows = [DEFINITION.fullmatch(line.strip()) for line in block.splitlines()]
            formatter.write_paragraph()
            with formatter.indentation():
                if all(rows):
                    formatter.write_dl([(row[1], row[2]) for row in rows if row])
                else:
                    formatter.write_text(" ".join(block.split()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments and options under their headings, and the examples."""
        _write_options(self, ctx, formatter)
        _write_examples(self.examples, formatter)


class Command(_Page):
    """A command whose help has its options under headings, its default values, and examples."""

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **others: Any):
        """Add examples, each a command line, to what click knows of a command."""
        others = {"context_settings": HELP, **others}
        super().__init__(*arguments, **others)
        self.examples = tuple(examples)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function, with what was given for a model's fields as one dictionary."""
        fields = [param for param in self.params if isinstance(param, Option) and param.field is not None]
        if fields:
            given = {}
            for param in fields:
                value = ctx.params.pop(param.name)
                if ctx.get_parameter_source(str(param.name)) is not ParameterSource.DEFAULT:
                    given[param.field] = value
            ctx.params["given"] = given
        return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words, and remember what code they name: it may be imported, and none that only a file names."""
        left = super().parse_args(ctx, args)
        for param in self.params:
            is_typed = ctx.get_parameter_source(str(param.name)) is not ParameterSource.DEFAULT
            if is_typed and isinstance(param.type, TextType) and param.type.names is not None:
                value = ctx.params.get(str(param.name))
                if isinstance(value, tuple):
                    value = ",".join(value)
                trust.trust(*trust.names_in(str(value)))
        return left


class Group(_Page, click.Group):
    """Several commands in one: `haq runs list`, `haq runs show`."""

    def __init__(self, name: str, text: str | None, *, examples: Sequence[str] = (), **others: Any):
        """Describe the group.

        Args:
            name: Its name.
            text: The docstring of its module: a first sentence, and what else its help says.
            examples: Command lines that its help shows.
            **others: What click takes besides.
        """
        others = {"no_args_is_help": False, "context_settings": HELP, **others}
        super().__init__(name, help=text, short_help=summary_of(text), **others)
        self.examples = tuple(examples)

    def add(self, name: str, text: str, *, examples: Sequence[str] = ()) -> Callable[[Callable[..., int]], Command]:
        """Decorate a function that becomes a command of the group; see `command` for the arguments.

        Args:
            name: The command's name, as after the group's.
            text: Its help.
            examples: Command lines that the help shows.

        Returns:
            The decorator.
        """

        def decorate(function: Callable[..., int]) -> Command:
            made = command(name, text, examples=examples)(function)
            self.add_command(made)
            return made

        return decorate

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, the options under their headings, and the examples."""
        self.format_commands(ctx, formatter)
        _Page.format_options(self, ctx, formatter)

    def known_words(self, ctx: click.Context) -> list[str]:
        """List the words that can follow the group's name."""
        return self.list_commands(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first word; of an unknown one, name those that are close."""
        name = args[0]
        found = self.get_command(ctx, name)
        if found is None and not ctx.resilient_parsing:
            if name.startswith("-"):
                raise click.NoSuchOption(name, ctx=ctx)
            known = self.known_words(ctx)
            raise Misuse(f"there is no command {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}", ctx=ctx)
        return name, found, args[1:]


def command(name: str, text: str | None, *, examples: Sequence[str] = ()) -> Callable[[Callable[..., int]], Command]:
    """Make a command of a function that returns an exit status.

    Args:
        name: The command's name, as after `haq`.
        text: The docstring of its module: its first sentence is its line in lists, all of it stands in its help.
        examples: Command lines that the help shows.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., int]) -> Command:
        about = {"help": text, "short_help": summary_of(text), "examples": examples}
        return click.command(name, cls=Command, **about)(function)

    return decorate


def summary_of(text: str | None) -> str:
    """Take the first sentence of a docstring, without the full stop."""
    paragraph = (text or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".")


def main_of(cli: click.Command) -> Main:
    """Make the function `main(arguments)` of a command module.

    Args:
        cli: The command or the group.

    Returns:
        A function that takes the words after the command's name (None: those that the process was started with) and returns
        the exit status. It raises ValueError, in one sentence, for words that the command doesn't understand.
    """

    def main(arguments: list[str] | None = None) -> int:
        return call(cli, arguments, f"haq {cli.name}")

    return main


def call(cli: click.Command, words: Sequence[str] | None, program: str) -> int:
    """Call a command and return its exit status.

    Args:
        cli: The command or the group.
        words: What follows its name; None: what the process was started with, in which an option may stand once.
        program: Its name, as help and messages write it: "haq search".

    Returns:
        The exit status.

    Raises:
        ValueError: For words that it doesn't understand, in one sentence with the close ones.
    """
    mark = None
    if words is None:
        words = sys.argv[1:]
        mark = TYPED
    try:
        with trust.command(), cli.make_context(program, [str(word) for word in words], obj=mark) as context:
            return int(cli.invoke(context) or 0)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        raise ValueError(_sentence(error, program)) from None
    finally:
        VERBOSITY.reset()


def _check_given_once(params: Sequence[click.Parameter], ctx: click.Context) -> None:
    """Raise Misuse for an option that stands twice among those that were given, and may not."""
    seen = set()
    for param in params:
        if not isinstance(param, click.Option) or param.multiple or param.count or param.is_eager:
            continue
        if param.name in seen:
            raise Misuse(f"{name_of(param)} is given twice, and can be given once; see {ctx.command_path} --help", ctx=ctx)
        seen.add(param.name)


def _sentence(error: click.ClickException, program: str) -> str:
    """What is wrong with a command line, in one sentence or two."""
    context: click.Context | None = getattr(error, "ctx", None)
    where = context.command_path if context is not None else program
    help_hint = f"see {where} --help"
    if isinstance(error, click.NoSuchOption):
        known = []
        if context is not None:
            known = [word for word in option_strings(context.command) if word.startswith("--")]
        return f"there is no option {error.option_name}{did_you_mean(error.option_name, known)} See {where} --help"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        about = getattr(error.param, "about", None) or getattr(error.param, "help", "")
        return f"{name_of(error.param)} is missing, {about}; {help_hint}"
    if isinstance(error, (Misuse, click.BadParameter)):
        return error.message
    message = error.format_message().rstrip(".")
    if isinstance(error, click.BadOptionUsage):
        return f"{message.removeprefix('Option ').replace(chr(39), '')}; {help_hint}"
    if message == "Missing command":
        known = []
        if context is not None and isinstance(context.command, click.Group):
            known = context.command.list_commands(context)
        return f"a command is missing after {where}: {' or '.join(known)}; {help_hint}"
    if message.startswith("Got unexpected extra argument"):
        return f"{message.partition('(')[2].rstrip(')')!r} is one thing too many; {help_hint}"
    return f"{message[:1].lower()}{message[1:]}; {help_hint}"


def _write_options(cli: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    groups: dict[str, list[tuple[str, str]]] = {ARGUMENTS: []}
    for param in cli.get_params(ctx):
        if isinstance(param, Argument):
            groups[ARGUMENTS].append((param.human_readable_name.upper(), param.about))
            continue
        record = param.get_help_record(ctx)
        if record is not None:
            groups.setdefault(getattr(param, "group", COMMON), []).append(record)
    groups[COMMON] = groups.pop(COMMON, [])
    widths = [len(term) for rows in groups.values() for term, _ in rows]
    # All groups have their descriptions in the same column.
    column = max(width for width in (0, *widths) if width <= COLUMN)
    for heading, rows in groups.items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl([(term.ljust(column), about) for term, about in rows], col_max=column)


def _write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    if not examples:
        return
    with formatter.section("Examples"):
        for example in examples:
            for line in _broken(example, formatter.width - 2):
                formatter.write(f"  {line}\n")


def _broken(line: str, width: int) -> list[str]:
    """Break a command line into lines that a shell reads as one; a comment at its end goes before it."""
    line, _, comment = line.partition("  # ")
    indent = "    "
    lines = [f"# {comment}"] if comment else []
    current = ""
    # An option stays with its value.
    for part in line.replace(" --", "\n--").split("\n"):
        longer = f"{current} {part}"
        if not current:
            longer = part
        if len(longer) > width - 2 and current:
            lines.append(f"{current} \\")
            longer = indent + part
        current = longer
    return [*lines, current]
