"""Write the pages of the reference from what the code says of itself: commands, names of Python, files.

    write_reference(Path("build/docs"))         # what docs/build.py does

Every page is Markdown. Nothing on them is written twice: options come from click, names from docstrings, and keys from the
classes that read files.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from haq.__main__ import COMMANDS, LISTED
from haq.__main__ import cli as HAQ
from haq.console.commands import DEFINITION, summary_of
from haq.console.options import ARGUMENTS, COMMON, Argument
from haq.console.values import ChoiceType
from haq.store import files, records
from hw_models import lut
from hw_models.capabilities import KINDS, Capabilities
from hw_models.machine import Chip
from hw_models.target import HARDWARE_MODELS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("quantizers", "hw_models", "envs", "haq")
# What users import first: each has a page with its names, wherever these are defined.
FACES = {
    "haq": "the search in Python",
    "quantizers": "quantize a network, train it, prune it",
    "hw_models": "what a network costs on a piece of hardware",
    "envs": "Gymnasium environments",
    "haq.deploy": "run what was deployed",
    "haq.training": "the training loop, and training methods of your own",
    "haq.attacks": "attack a network, and attacks of your own",
    "haq.networks": "networks by name, and checkpoints",
    "haq.data": "data by name, in three splits",
    "haq.solvers": "solvers, and one of your own",
    "haq.problem": "problems, and objectives of your own",
}
SPECIAL = re.compile(r"([\\`*_{}\[\]|])")
MARK = re.compile(r"\[\[([a-z ]+)\]\]")
OPTION = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")


RECORDS = "haq.store.records"
SHORT = 40  # characters of a constant that is shown
# What the keys of a hardware file may be, in words.
VALUES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", tuple: "list"}
# Keys that say all in their names, or that the class can't describe.
KEYS = {
    "model": "which model of hardware reads the file",
    "name": "what tables and runs call it",
    "description": "one line about it",
    "clock_mhz": "million cycles per second",
    "weight_port_bits_per_cycle": "how fast weights are fetched",
    "activation_port_bits_per_cycle": "how fast activations are fetched",
    "dram_read_bits_per_cycle": "how fast memory is read",
    "dram_write_bits_per_cycle": "how fast memory is written",
    "dram_bits_per_cycle": "how fast memory is read and written",
    "weight_buffer_bytes": "size of the buffer on the chip",
    "activation_buffer_bytes": "size of the buffer on the chip",
    "output_buffer_bytes": "size of the buffer on the chip",
    "weight_buffer_read_pj_per_bit": "energy of reading the buffer",
    "weight_buffer_write_pj_per_bit": "energy of writing the buffer",
    "activation_buffer_read_pj_per_bit": "energy of reading the buffer",
    "activation_buffer_write_pj_per_bit": "energy of writing the buffer",
    "output_buffer_read_pj_per_bit": "energy of reading the buffer",
    "output_buffer_write_pj_per_bit": "energy of writing the buffer",
    "dram_pj_per_bit": "energy of moving a bit from or to memory",
}
ALIASES = {
    "Share": "share",
    "KeptShare": "share below 1",
    "Cost": "cost",
    "AnyWidth": "width, float is 32",
    "UniformWidths": "width, or a pair such as 4/8",
    "Count": "count",
    "Metric": "metric",
    "ByWidth": "list by width",
    "CostTable": "costs by weight width and activation width",
    "Settings": "object",
    "Texts": "object of text",
    "Names": "list of text",
    "Counts": "object of counts",
    "Shares": "object of shares",
    "Values": "object of numbers",
}


def write_reference(folder: Path) -> None:
    """Write all that is generated into a folder of the site's pages, in place of the marks such as [[commands]]."""
    reference = folder / "reference"
    python = reference / "python"
    python.mkdir(parents=True, exist_ok=True)
    for name, _ in modules():
        (python / f"{name}.md").write_text(module_page(name), encoding="utf-8")
    for page in sorted(reference.glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Put what is generated in place of the marks of a page. Raises KeyError for a mark that nothing is known for."""
    return MARK.sub(lambda found: GENERATED[found[1]](), text)


# Python


class Name(NamedTuple):
    """A public name: where it is defined, and what is said of it."""

    module: str
    name: str
    is_documented: bool  # whether the page of its module has it, which it hasn't of a constant
    about: str


def module_file(module: str) -> Path:
    """Find the file of a module; of a package whose names stand in a stub, the stub."""
    folder = ROOT.joinpath(*module.split("."))
    files = (folder / "__init__.pyi", folder / "__init__.py", folder.with_suffix(".py"))
    return next(file for file in files if file.exists())


@functools.cache
def tree_of(module: str) -> ast.Module:
    """Read a module without importing it."""
    return ast.parse(module_file(module).read_text(encoding="utf-8"))


def docstring_of(module: str) -> str:
    """Read a module's docstring."""
    file = module_file(module).with_suffix(".py")
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def modules() -> Iterator[tuple[str, str]]:
    """Go through the public modules: dotted name, and the first paragraph of its docstring."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if not any(part.startswith("_") for part in parts):
                name = ".".join(parts)
                yield name, docstring_of(name).partition("\n\n")[0].replace("\n", " ")


def public_names(module: str) -> list[str]:
    """List what a package has for its users: its `__all__`, but for modules, or what its stub or lazy imports name."""
    found: dict[str, None] = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, ast.List):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            if ast.unparse(target) == "__all__":
                found |= dict.fromkeys(ast.literal_eval(node.value))
        elif isinstance(node, ast.ImportFrom):
            found |= dict.fromkeys(one.asname for one in node.names if one.asname == one.name)
    if not found:
        defined = (node for node in tree_of(module).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
        found = dict.fromkeys(node.name for node in defined if not node.decorator_list)
    return [name for name in found if name and not name.startswith("_") and not is_module(module, name)]


def is_module(package: str, name: str) -> bool:
    """Say whether a name of a package is a module in it, and nothing of that name in one."""
    for node in ast.walk(tree_of(package)):
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            return absolute(node, package) == package
    return False


def absolute(node: ast.ImportFrom, module: str) -> str:
    """Name the module that something is imported from, without dots at its beginning."""
    if not node.level:
        return node.module or ""
    return ".".join([module, node.module] if node.module else [module])  # dots stand in the stub of a package only


def find(module: str, name: str) -> Name:
    """Follow a name from where it is offered to where it is defined.

    Args:
        module: The module that has it.
        name: The name.

    Returns:
        What is said of it there.

    Raises:
        ValueError: For a name that isn't defined in one of our modules.
    """
    tree = tree_of(module)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return Name(module, name, True, first_sentence(ast.get_docstring(node) or ""))
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if name in map(ast.unparse, targets):
                return Name(module, name, False, constant_words(module, node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(name == (one.asname or one.name) for one in node.names):
            origin = next(one.name for one in node.names if name == (one.asname or one.name))
            return find(absolute(node, module), origin)
    raise ValueError(f"{name} is not defined in {module}")


def first_sentence(text: str) -> str:
    """Take the first sentence of a docstring."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def comment_on(module: str, node: ast.stmt) -> str:
    """Read the comment that stands behind a definition, or in the lines above it."""
    lines = module_file(module).read_text(encoding="utf-8").splitlines()
    assert node.end_lineno is not None
    _, _, behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("# "):
            break
        above.insert(0, line[2:])
    return behind or " ".join(above)


def constant_words(module: str, node: ast.Assign | ast.AnnAssign) -> str:
    """Say what a constant is: its value, if that is short, and the comment on it."""
    value = ast.unparse(node.value) if node.value is not None else ""
    shown = f"`{value}`" if value and len(value) <= SHORT else ""
    return ": ".join(part for part in (shown, comment_on(module, node)) if part)


def names_table(module: str, folder: str) -> str:
    """Write the table of a package's names, each with a link to where it is documented.

    Args:
        module: The package.
        folder: Where the pages of modules are, from the page that shows the table.

    Returns:
        Markdown; empty where the package has no names but those of its modules.
    """
    rows = []
    for name in public_names(module):
        found = find(module, name)
        place = f"{folder}{found.module}.md"
        if found.is_documented:
            place += f"#{found.module}.{found.name}"
        rows.append(f"| [`{name}`]({place}) | {words(found.about)} |\n")
    return "| name | what it is |\n|---|---|\n" + "".join(rows) if rows else ""


def modules_table() -> str:
    """Write the list of all public modules."""
    rows = [f"| [`{name}`](python/{name}.md) | {words(told)} |\n" for name, told in modules()]
    return "| module | what it does |\n|---|---|\n" + "".join(rows)


def faces_table() -> str:
    """Write what users import first: for each package its names."""
    parts = []
    for face, about in FACES.items():
        parts.append(f"## {face}\n\n[`{face}`](python/{face}.md): {about}.\n\n{names_table(face, 'python/')}")
    return "\n".join(parts)


def module_page(module: str) -> str:
    """Write the page of a module: its docstring, the names that it passes on, and what it defines."""
    text = f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
    if module_file(module).stem != "__init__" or not public_names(module):
        return text
    own = [name for name in public_names(module) if find(module, name)[:3] == (module, name, True)]
    text += f"      members: {json.dumps(own) if own else 'false'}\n"
    return f"{text}\n## Names of {module}\n\n{names_table(module, '')}"


# Commands


def commands() -> str:
    """Write a list of all commands, and a chapter for each with what its parser takes."""
    context = click.Context(HAQ, info_name="haq", **HAQ.context_settings)
    lists, chapters = [], []
    for heading, names in headed(context):
        rows = []
        for name in names:
            found = HAQ.get_command(context, name)
            assert found is not None
            rows.append(f"| [`haq {name}`](#haq-{name}) | {words(summary_of(found.help))} |\n")
            chapters += command_chapters(found, ["haq", name])
        lists.append(f"**{heading}**\n\n| command | what it does |\n|---|---|\n{''.join(rows)}")
    short = ", ".join(f"`haq {kind}`" for kind in LISTED)
    lists.append(f"Short for `haq list KIND`: {short}.\n")
    common = options_tables(HAQ, ["haq"], context)
    return "\n".join([*lists, "## haq\n", "These stand before the name of a command.\n", *common, *chapters])


def headed(context: click.Context) -> Iterator[tuple[str, list[str]]]:
    """Go through the headings that commands stand under, as `haq --help` has them."""
    headings = list(COMMANDS)
    for heading, names in COMMANDS.items():
        others = [name for name in HAQ.commands if heading == headings[-1]]
        yield heading, [*names, *others]


def command_chapters(command: click.Command, path: Sequence[str]) -> Iterator[str]:
    """Write the chapter of a command and, of a group, those of its commands.

    Args:
        command: The command.
        path: The words it is called by: ["haq", "runs"].

    Yields:
        Parts of the page.
    """
    context = click.Context(command, info_name=" ".join(path), **command.context_settings)
    level = "#" * len(path)
    yield f"{level} {' '.join(path)} {{ #{anchor(path)} }}\n"
    yield help_text(command)
    usage = " ".join([" ".join(path), *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```\n"
    yield from options_tables(command, path, context)
    examples = getattr(command, "examples", ())
    if examples:
        yield "**Examples**\n"
        yield "```bash\n" + "\n".join(examples) + "\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from command_chapters(found, [*path, name])


def options_tables(command: click.Command, path: Sequence[str], context: click.Context) -> Iterator[str]:
    """Write a table for each heading that a command's arguments and options stand under.

    Args:
        command: The command.
        path: The words it is called by.
        context: Its context.

    Yields:
        Tables, with their headings.
    """
    groups: dict[str, list[str]] = {ARGUMENTS: []}
    for param in command.get_params(context):
        if isinstance(param, Argument):
            written = param.human_readable_name.upper()
            groups[ARGUMENTS].append(row_of(written, values_of(param), param.about, "", anchor([*path, str(param.name)])))
        elif isinstance(param, click.Option) and not param.hidden:
            group = getattr(param, "group", COMMON)
            groups.setdefault(group, []).append(option_row(param, path))
    groups[COMMON] = groups.pop(COMMON, [])
    for heading, rows in groups.items():
        if rows:
            first = "argument" if heading == ARGUMENTS else "option"
            head = f"| {first} | value | default | what it is |\n|---|---|---|---|\n"
            yield f"**{heading}**\n\n{head}{''.join(rows)}"


def option_row(param: click.Option, path: Sequence[str]) -> str:
    """Write the row of an option: how it is written, its value, its default, and what it is."""
    strings = sorted([*param.opts, *param.secondary_opts], key=lambda word: (word.startswith("--"), word.startswith("--no-")))
    about = param.help or ""
    default = getattr(param, "default_words", None) or ""
    if param.multiple and "several times" not in about:
        about += "; may be given several times"
    main = max(param.opts, key=lambda word: word.startswith("--"))
    return row_of(", ".join(strings), values_of(param), about, default, anchor([*path, main.lstrip("-")]))


def row_of(written: str, values: str, about: str, default: str, name: str) -> str:
    """Write a row of a table of options. The name is what a link to it ends with."""
    code = " ".join(f"`{word}`" for word in written.split(", "))
    return f'| <span id="{name}"></span>{code} | {code_of(values)} | {words(default)} | {words(about)} |\n'


def values_of(param: click.Parameter) -> str:
    """Say what stands for the value of an option, or which values it has; nothing for a flag."""
    if isinstance(param, click.Option) and (param.is_flag or param.count):
        return ""
    if isinstance(param.type, ChoiceType):
        return param.type.written
    if isinstance(param, Argument):
        return ""
    return str(param.metavar or param.type.name.upper())


def code_of(text: str) -> str:
    """Write values as code, with spaces where a line may be broken."""
    return " ".join(f"`{part}`" for part in text.split("|") if part)


def anchor(path: Sequence[str]) -> str:
    """Name the place of a command, as in haq-runs-list, or of an option, as in search-budget."""
    return "-".join(path)


def help_text(command: click.Command) -> str:
    """Write what a help says of a command: paragraphs, and lists of a term and its meaning."""
    blocks = []
    for block in textwrap.dedent(command.help or "").strip().split("\n\n"):
        rows = [DEFINITION.fullmatch(line.strip()) for line in block.splitlines()]
        if all(rows):
            blocks.append("".join(f"* `{row[1]}`: {words(row[2])}\n" for row in rows if row))
        else:
            blocks.append(words(" ".join(block.split())) + "\n")
    return "\n".join(blocks)


def words(text: str) -> str:
    """Write plain text as Markdown, with the options and what stands between backticks in it as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick that is none of a pair
        return plain(text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"`{part}`"
        else:
            parts[index] = "".join(f"`{one}`" if at % 2 else plain(one) for at, one in enumerate(OPTION.split(part)))
    return "".join(parts)


def plain(text: str) -> str:
    """Write text so that nothing in it is Markdown or HTML."""
    return SPECIAL.sub(r"\\\1", html.escape(text, quote=False))


# Files


def target_keys() -> str:
    """Write the keys of YAML files that describe hardware: those of all, and those of each model."""
    parts = ["Every file has these keys:\n", keys_table(Chip, Chip.model_fields)]
    lines = {row.name: row.line for row in HARDWARE_MODELS.rows()}
    for kind in HARDWARE_MODELS:
        model = HARDWARE_MODELS.get(kind)
        own = [name for name in model.model_fields if name not in Chip.model_fields]
        page = f"python/{model.__module__}.md"
        parts.append(f"`model: {kind}`, [{words(lines[kind])}]({page}):\n")
        parts.append(keys_table(model, own))
    return "\n".join(parts)


def capability_keys() -> str:
    """Write the keys below `capabilities:`."""
    return keys_table(Capabilities, Capabilities.model_fields)


def keys_table(model: type[BaseModel], names: Iterable[str]) -> str:
    """Write a table of some fields of a model: key, what it may be, its default, and what it is.

    Args:
        model: The model; a field is described by itself, or by the class's docstring.
        names: The fields.

    Returns:
        Markdown.
    """
    told = attributes_of(inspect.getdoc(model) or "")
    rows = []
    for name in names:
        field = model.model_fields[name]
        about = field.description or told.get(name) or KEYS.get(name, "")
        default = "" if field.is_required() else default_words(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {value_words(field)} | {default} | {words(about)} |\n")
    return "| key | value | default | what it is |\n|---|---|---|---|\n" + "".join(rows)


def attributes_of(text: str) -> dict[str, str]:
    """Read the section Attributes of a docstring: what is said of each name, without the full stop."""
    _, _, section = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    for line in section.splitlines():
        if match := re.match(r"    (\w+)(?: \(.*?\))?: (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif line.startswith("        "):
            found[name] += f" {line.strip()}"
        else:
            break
    return {name: about.rstrip(".") for name, about in found.items()}


def default_words(value: Any) -> str:
    """Write a default as YAML has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value or value == 0 else "empty"


def value_words(field: FieldInfo) -> str:
    """Say what a field may be: its kind, and its bounds."""
    kinds = [kind for kind in (typing.get_args(field.annotation) or ()) if kind is not type(None)]
    annotation: Any = field.annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = kinds[0]
    if typing.get_origin(annotation) is typing.Literal:
        return " ".join(f"`{value}`" for value in typing.get_args(annotation))
    written = VALUES.get(annotation) or VALUES.get(typing.get_origin(annotation)) or "mapping"
    bounds = []
    for one in field.metadata:
        for sign, symbol in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "at most")):
            bound = getattr(one, sign, None)
            if bound is not None:
                bounds.append(f"{symbol} {bound:,}")
    return ", ".join([written, *bounds])


def record_keys() -> str:
    """Write the keys of every record: what is a file of its own first, then what stands within these."""
    tree = tree_of(RECORDS)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    of_files = {name for name, node in classes.items() if is_file_record(node, classes)}
    parts = ["## Files\n"]
    parts += [record_part(classes[name], classes) for name in classes if name in of_files and name != "FileRecord"]
    parts.append("## Parts of files\n")
    parts += [record_part(node, classes) for name, node in classes.items() if name not in of_files and own_keys(node)]
    return "\n".join(parts)


def bases(node: ast.ClassDef) -> list[str]:
    """Name the classes that a class is made from."""
    return [ast.unparse(base) for base in node.bases]


def is_file_record(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> bool:
    """Say whether a record is a file of its own."""
    names = bases(node)
    return "FileRecord" in names or any(is_file_record(classes[name], classes) for name in names if name in classes)


def own_keys(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """List the fields that a record has of its own."""
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
    return [one for one in fields if "ClassVar" not in ast.unparse(one.annotation) and ast.unparse(one.target)[0] != "_"]


def record_part(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> str:
    """Write the part of the page that is about one record.

    Args:
        node: Its class.
        classes: All records.

    Returns:
        Markdown.
    """
    text = ast.get_docstring(node) or ""
    told = attributes_of(text)
    parts = [f"### {node.name} {{ #{node.name.lower()} }}\n", f"{words(' '.join(text.partition(chr(10) * 2)[0].split()))}\n"]
    schema = next(
        (one.value for one in node.body if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "SCHEMA"), None
    )
    if schema is not None:
        parts.append(f"`schema`: `{getattr(records, ast.unparse(schema), None) or getattr(files, ast.unparse(schema)[6:])}`\n")
    others = [name for name in bases(node) if name in classes and own_keys(classes[name])]
    if others:
        parts.append(f"It also has the keys of {', '.join(f'[{name}](#{name.lower()})' for name in others)}.\n")
    rows = []
    for one in own_keys(node):
        key, default = key_and_default(one)
        about = told.get(ast.unparse(one.target)) or comment_on(RECORDS, one)
        rows.append(f"| `{key}` | {type_words(one.annotation, classes)} | {default} | {words(about)} |\n")
    if rows:
        parts.append("| key | value | default | what it is |\n|---|---|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def key_and_default(node: ast.AnnAssign) -> tuple[str, str]:
    """Read how a field is called in its file, and its default."""
    key, value = ast.unparse(node.target), node.value
    if isinstance(value, ast.Call):
        key = next((ast.literal_eval(one.value) for one in value.keywords if one.arg == "alias"), key)
        value = value.args[0] if value.args else None
    if value is None:
        return key, ""
    found = getattr(records, value.id) if isinstance(value, ast.Name) else ast.literal_eval(value)
    return key, default_words(found)


def type_words(annotation: ast.expr, classes: Mapping[str, ast.ClassDef]) -> str:
    """Write a type as the file has it; records are links to their own keys."""
    text = ast.unparse(annotation)
    while match := re.search(r"Annotated\[((?:[^][]|\[[^][]*\])*?), Field\([^()]*\)\]", text):
        text = text.replace(match[0], match[1])
    for short, meant in ALIASES.items():
        text = re.sub(rf"\b{short}\b", meant, text)
    text = text.replace("| None", "or null").replace(" | ", " or ").replace("'", "")
    text = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " or "), text)
    text = re.sub(r"\bdict\[str, ((?:[^][]|\[[^][]*\])*)\]", r"object of \1", text)
    text = re.sub(r"\blist\[((?:[^][]|\[[^][]*\])*)\]", r"list of \1", text)
    for kind, meant in {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.items():
        text = re.sub(rf"\b{kind}\b", meant, text)
    shown = [name for name, node in classes.items() if own_keys(node) or is_file_record(node, classes)]
    links = {name: f"[{name}](#{name.lower()})" for name in shown}
    return re.sub(r"\b\w+\b", lambda found: links.get(found[0], found[0]), plain(text))


def constant(module: str, name: str) -> str:
    """Read a constant of a module."""
    return str(getattr(importlib.import_module(module), name))


def policy_versions() -> str:
    """Say which versions of a policy are read."""
    return " or ".join(f"`{constant('quantizers.policy', name)}`" for name in ("VERSION", "KEEP_VERSION"))


def code_list(names: Iterable[str]) -> str:
    """Write names as code."""
    return ", ".join(f"`{name}`" for name in names)


# What a mark of a page stands for.
GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "faces": faces_table,
    "modules": modules_table,
    "records": record_keys,
    "target keys": target_keys,
    "capability keys": capability_keys,
    "kinds": lambda: code_list(KINDS),
    "policy versions": policy_versions,
    "keep version": lambda: constant("quantizers.policy", "KEEP_VERSION"),
    "run schema": lambda: files.RUN_SCHEMA,
    "problem schema": lambda: files.PROBLEM_SCHEMA,
    "result schema": lambda: files.RESULT_SCHEMA,
    "sweep schema": lambda: files.SWEEP_SCHEMA,
    "robustness schema": lambda: files.ROBUSTNESS_SCHEMA,
    "sensitivity schema": lambda: files.SENSITIVITY_SCHEMA,
    "agent schema": lambda: files.AGENT_SCHEMA,
    "solution schema": lambda: constant("haq.study.solving", "SOLUTION_SCHEMA"),
    "checkpoint format": lambda: constant("haq.networks.checkpoint", "CHECKPOINT_FORMAT"),
    "quantized format": lambda: constant("haq.networks.checkpoint", "QUANTIZED_FORMAT"),
    "deployed format": lambda: constant("haq.deployment.folder", "FORMAT"),
    "c format": lambda: constant("haq.deployment.c", "FORMAT"),
    "shape columns": lambda: code_list(lut.SHAPE),
    "latency columns": lambda: code_list(lut.SECONDS),
    "energy columns": lambda: code_list(lut.JOULES),
}
