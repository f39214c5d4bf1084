"""Commands and their options, on top of click.

An option and its default have one home: a field of a pydantic model.

    from haq.console.commands import command, main_of
    from haq.console.options import argument, flag, option, options_of, output_options, setting, trust_option
    from haq.console.values import FOLDER

    class TrainConfig(BaseModel):
        epochs: int = setting(20, "passes over the train images", group="Training", metavar="N")
        learning_rate: float = setting(0.005, "of SGD; it falls to 0 as a cosine does", group="Training")

    @command("train", __doc__, examples=("haq train --network mobilenet-mini --epochs 30",))
    @options_of(TrainConfig)                     # --epochs and --learning-rate; options_of(Model, only=(...), leave_out=(...))
    @argument("run", FOLDER, "the folder of a finished search")     # RUN
    @option("--out", FOLDER, "folder to write", group="Output", default_words="one under runs/")
    @flag("--resume", "go on with what was interrupted", group="Output")
    @trust_option()                              # --trust: for every command on a run, a checkpoint or another file
    @output_options()                            # --json, -q, -v
    def cli(given: dict[str, Any], run: Path, out: Path | None, resume: bool, as_json: bool) -> int:
        config = TrainConfig(**given)            # `given` holds what the user gave, by field, and nothing else
        ...
        return 0

    main = main_of(cli)

    if __name__ == "__main__":
        sys.exit(run_command(main))

The command's object is called `cli` in every module: `haq/__main__.py` looks for it there. The first sentence of the module's
docstring is its line in `haq --help`, the rest stands in its own help. What takes long to import (torch) is imported inside
the function, so that help comes at once. Several commands in one, such as `haq runs list`, are a `Group`:

    cli = Group("runs", __doc__)

    @cli.add("list", "Show the runs of a folder.")
    @output_options(quiet=False)
    def list_runs(...) -> int: ...
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from haq.console.output import VERBOSITY
from haq.console.values import FILE, INTEGER, NUMBER, TEXT, Names, TextType
from hw_models import trust

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]

TYPED = object()  # marks words from a command line; a program may put what it changes behind what it has
COMMON = "General"  # the group of --json, -q, -v and --help
CODE = "Code of others"  # the group of --trust
ARGUMENTS = "Arguments"


def setting(
    default: Any,
    description: str,
    *,
    group: str,
    metavar: str | None = None,
    spellings: Sequence[str] = (),
    names: Names | None = None,
    default_words: str | None = None,
    least: int | None = None,
    several: bool = False,
) -> Any:
    """Declare a field of a pydantic model that is an option of commands too.

    Args:
        default: Its default. None, if it is left out unless it is given.
        description: What it is, in a few words, for the help and for a reader of the model.
        group: The heading that it stands under in a help: "Hardware".
        metavar: What stands for its value in a help: "NAME". By default from its type.
        spellings: Other names of the option: ("--reward",). One that begins with "--no-" switches a flag off.
        names: Gives the values that a shell can complete; called only when one does.
        default_words: What the help says of the default, where that isn't the default itself.
        least: The smallest number that is accepted.
        several: Whether the option may be given several times; the field, a text, then gets the values parted by commas.

    Returns:
        The field, for the right-hand side of its annotation.
    """
    about: dict[str, Any] = {"group": group, "metavar": metavar, "spellings": list(spellings), "default_words": default_words}
    about["several"] = several
    field: FieldInfo = Field(default, description=description, json_schema_extra=about, ge=least)
    if names is not None:
        field.metadata.append(Completion(names))
    return field


class Completion(NamedTuple):
    """The names that a shell can complete a value to."""

    names: Names


def option_name(field: str) -> str:
    """Write the option of a field: finetune_epochs is --finetune-epochs."""
    return f"--{field.replace('_', '-')}"


def _type_of(field: FieldInfo) -> tuple[click.ParamType, bool]:
    """The type of an option's values by its field's annotation, and whether it is a flag."""
    kinds = [field.annotation]
    if typing.get_origin(field.annotation) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(field.annotation) if kind is not types.NoneType]
    kind = kinds[0]
    if kind is bool:
        return click.BOOL, True
    if kind is int:
        return INTEGER, False
    if kind is float:
        return NUMBER, False
    if kind is Path:
        return FILE, False
    completion = next((one for one in field.metadata if isinstance(one, Completion)), None)
    return TextType(completion.names if completion else None), False


class Option(click.Option):
    """An option that stands under a heading in the help."""

    def __init__(self, *words: Any, group: str, default_words: str | None = None, field: str | None = None, **others: Any):
        """Add a heading, what is said of the default, and the field that it sets, to what click knows of an option."""
        super().__init__(*words, **others)
        self.group = group
        self.default_words = default_words
        self.field = field

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Give the two columns of the help: how it is written, and what it is."""
        if self.hidden:
            return None
        written = ", ".join(sorted(self.opts, key=lambda word: (word.startswith("--"), self.opts.index(word))))
        if self.secondary_opts:
            written = f"{written}, {', '.join(self.secondary_opts)}"
        if not self.is_flag and not self.count:
            written = f"{written} {self.metavar or getattr(self.type, 'written', self.type.name.upper())}"
        about = self.help or ""
        if self.default_words is not None:
            about = f"{about}  [default: {self.default_words}]"
        return written, about


class Argument(click.Argument):
    """What a command is given without a name; unlike click's own, the help says what it is."""

    def __init__(self, *words: Any, about: str, **others: Any):
        """Add a few words for the help."""
        super().__init__(*words, **others)
        self.about = about


def options_of(model: type[BaseModel], *, only: Sequence[str] = (), leave_out: Sequence[str] = ()) -> Decorator:
    """Give a command an option for each field of a model.

    The command takes an argument `given`: what the user gave, by the names of the fields. What wasn't given isn't in there.

    Args:
        model: The model; its fields are declared with `setting`.
        only: Fields to take; none: all of them.
        leave_out: Fields to leave out.

    Returns:
        The decorator.
    """
    names = [name for name in model.model_fields if (not only or name in only) and name not in leave_out]

    def decorate(function: Function) -> Function:
        # Decorators are applied from the last to the first.
        for name in reversed(names):
            function = _option_of(name, model.model_fields[name])(function)
        return function

    return decorate


def part_of(given: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Take what was given for the fields of one model, where a command has options of several."""
    return {name: value for name, value in given.items() if name in model.model_fields}


def _option_of(name: str, field: FieldInfo) -> Decorator:
    about: Any = field.json_schema_extra or {}
    if "group" not in about:
        raise TypeError(f"field {name!r} is not declared with setting(): it has no group")
    default_words = about["default_words"]
    if default_words is None and field.default is not None and field.default is not False:
        default_words = str(field.default)
    kind, is_flag = _type_of(field)
    others: dict[str, Any] = {"is_flag": True} if is_flag else {"type": kind, "metavar": about["metavar"]}
    if about["several"]:
        others |= {"multiple": True, "callback": _join}
    written = [option_name(name)]
    for spelling in about["spellings"]:
        if is_flag and spelling.startswith("--no-"):
            written[0] += f"/{spelling}"
        else:
            written.append(spelling)
    return click.option(
        *written,
        name,
        cls=Option,
        help=field.description,
        group=about["group"],
        default_words=default_words,
        field=name,
        default=None,
        **others,
    )


def _join(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> str:
    """Make one text of the values of an option that was given several times.

    Of what a program gives, a value replaces an earlier one of the same NAME=, or without a name.
    """
    if ctx.obj is TYPED:
        return ",".join(values)
    kept = {}
    for value in values:
        name, _, _ = value.rpartition("=")
        kept[name] = value
    return ",".join(kept.values())


def option(
    name: str,
    kind: click.ParamType,
    description: str,
    *,
    group: str,
    metavar: str | None = None,
    default: Any = None,
    default_words: str | None = None,
    spellings: Sequence[str] = (),
    multiple: bool = False,
    parameter: str | None = None,
) -> Decorator:
    """Give a command an option that is no field of a model.

    Args:
        name: The option: "--out".
        kind: The type of its value: TEXT, INTEGER, NUMBER, FOLDER, FILE or ChoiceType((...)).
        description: What it is.
        group: The heading that it stands under.
        metavar: What stands for its value in the help.
        default: Its default.
        default_words: What the help says of the default, where that isn't the default itself.
        spellings: Other names of the option.
        multiple: Whether it may be given several times; the command then gets a tuple.
        parameter: The command's argument; by default called like the option: `out`.

    Returns:
        The decorator.
    """
    if default_words is None and default is not None:
        default_words = str(default)
    return click.option(
        name,
        *spellings,
        parameter or name.lstrip("-").replace("-", "_"),
        cls=Option,
        type=kind,
        help=description,
        group=group,
        metavar=metavar,
        default=default,
        default_words=default_words,
        multiple=multiple,
    )


def flag(name: str, description: str, *, group: str, parameter: str | None = None) -> Decorator:
    """Give a command an option without a value.

    Args:
        name: The option: "--dry-run".
        description: What it does.
        group: The heading that it stands under.
        parameter: The command's argument, a bool; by default called like the option.

    Returns:
        The decorator.
    """
    parameter = parameter or name.lstrip("-").replace("-", "_")
    return click.option(name, parameter, cls=Option, is_flag=True, default=False, help=description, group=group)


def argument(name: str, kind: click.ParamType, description: str, *, several: bool = False, required: bool = True) -> Decorator:
    """Give a command an argument that has no name on the command line.

    Args:
        name: What the command's function calls it: "run". The help writes it in capitals.
        kind: The type of its value, as for `option`.
        description: What it is.
        several: Whether it may be given several times; the command then gets a tuple.
        required: Whether it must be given; otherwise it is None, or an empty tuple.

    Returns:
        The decorator.
    """
    number = -1 if several else 1
    return click.argument(name, cls=Argument, type=kind, about=description, nargs=number, required=required)


def output_options(
    *, json: str | None = "print the result as JSON on stdout, all else on stderr", quiet: bool = True
) -> Decorator:
    """Give a command what all have: --json, -q and -v.

    Args:
        json: What --json does; None for a command without it. The command's argument is `as_json`.
        quiet: Whether there are -q and -v.

    Returns:
        The decorator.
    """

    def decorate(function: Function) -> Function:
        if quiet:
            function = click.option(*VERBOSE_WORDS, cls=Option, **_verbose())(function)
            function = click.option(*QUIET_WORDS, cls=Option, **_quiet())(function)
        if json is not None:
            function = flag("--json", json, group=COMMON, parameter="as_json")(function)
        return function

    return decorate


def trust_option() -> Decorator:
    """Give a command --trust, for code that only a file names; the command's function needn't know of it.

    Returns:
        The decorator.
    """

    def remember(ctx: click.Context, param: click.Parameter, names: tuple[str, ...]) -> None:
        trust.trust(*names)

    return click.option(
        "--trust",
        cls=Option,
        type=TEXT,
        metavar="MODULE:NAME",
        multiple=True,
        expose_value=False,
        callback=remember,
        group=CODE,
        help="let code be imported that only a file names, such as a run or a checkpoint; may be given several times",
    )


def verbosity_options() -> list[click.Parameter]:
    """Make -q and -v for a group of commands."""
    return [Option([*QUIET_WORDS], **_quiet()), Option([*VERBOSE_WORDS], **_verbose())]


QUIET_WORDS = ("-q", "--quiet")
VERBOSE_WORDS = ("-v", "--verbose")


def _quiet() -> dict[str, Any]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            VERBOSITY.set(-1)

    about = "print results, warnings and errors only"
    return {
        "is_flag": True,
        "default": False,
        "expose_value": False,
        "callback": callback,
        "group": COMMON,
        "help": about,
    }


def _verbose() -> dict[str, Any]:
    def callback(ctx: click.Context, param: click.Parameter, value: int) -> None:
        if value:
            VERBOSITY.set(value)

    about = "print every step too; -vv all that is logged"
    return {"count": True, "expose_value": False, "callback": callback, "group": COMMON, "help": about}
