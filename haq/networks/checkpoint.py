"""Networks in files: safetensors whose header says which network it is and, of a quantized one, its bits and schemes.

haq-checkpoint-1    a float network
haq-network-2       a quantized network: the tensors of the float network under their own keys, those of its quantizers under
                    "quantizer/"; policy and schemes as JSON in the header, and a hash of the structure of the float network;
                    with residual quantizers also where these are, and of a network of fewer channels which are kept

Files of both kinds tell which channels are kept where some were removed, and the groups of convolutions that learned them.
Nothing that a file holds is imported or executed, and its tensors are read once their sizes are known to be those of its
network. The same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.networks import split_name
from haq.networks.building import build_as_file_says, shapes_of
from haq.networks.grouped import (
    BLOCKS,
    GROUPINGS,
    read_blocks,
    read_groupings,
    regrouped,
    structure_notes,
    without_blocks,
)
from haq.networks.network import Network, output_count
from haq.networks.pruned import CHANNELS, SIZES, channels_notes, read_channels, shrunk
from haq.store import torch_files
from haq.store.files import check_file, check_schema, kind_of, quoted, write
from hw_models import trust
from hw_models.registry import printable
from quantizers.layers import OWN_ATTRIBUTES, QuantLayer, float_class
from quantizers.residuals import ResidualQuantizer, ResidualQuantizers, plain_class

CHECKPOINT_FORMAT = "haq-checkpoint-1"
QUANTIZED_FORMAT = "haq-network-2"
QUANTIZER = "quantizer/"  # what comes before the names of a quantization scheme's tensors
# Of an image that a checkpoint says its network takes: the largest of timm's.
MOST_AREA = 800 * 800
MOST_VALUES = 3 * MOST_AREA
MOST_CLASSES = 2**17
MOST_NOTE = 2**21  # characters of policy and schemes in a header
MOST_SHORT_NOTE = 1000  # characters of what else is read of it
MOST_HEADER = 2**24  # bytes of a header: the names and shapes of tensors, and notes
MOST_FILE = 2**40
MOST_PRUNED = 64  # times as large as in a file a network with all channels may be
MOST_WHOLE = 2**26  # and so many values besides
MOST_VALUE = 1e6  # of a mean or a deviation; its inverse is the least of a deviation
RESERVED = (
    "format",
    "network",
    "classes",
    "input_shape",
    "mean",
    "std",
    "policy",
    "schemes",
    "structure",
    "residuals",
    CHANNELS,
    GROUPINGS,
    BLOCKS,
    SIZES,
)
# The ends of the names of tensors that must be finite. What else a scheme keeps is its own affair: borders are infinite.
FINITE = ("weight", "bias", "running_mean", "running_var", "_scale", "_clip", "_offset", "_signed", "_error", "codebook")
Shape = tuple[int, ...]
STEPS = ("_scale", "_clip")  # the ends of the names of tensors whose values are distances
# Attributes of layers that training alone depends on, and that the shapes of tensors tell already.
UNSIGNED = {"training", "inplace", "momentum"}
UNSIGNED |= {"in_channels", "out_channels", "in_features", "out_features", "num_features"}
# Under which names training scripts save a state dict beside other things, and what wrappers put before the names in it.
STATE_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_UNREADABLE = (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError)
# What goes wrong while a network is made from what a file says.
_WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: free notes, and the shape of every tensor."""

    path: Path
    notes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def save_checkpoint(network: Network, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the weights of a network and what is needed to build it again; a quantized one as `save_quantized` does.

    Args:
        network: The network.
        path: The file, ending in .safetensors.
        notes: What else the header says.
    """
    if Q.quant_layers(network.module):
        save_quantized(path, network.module, network, notes)
        return
    header = {"format": CHECKPOINT_FORMAT, **_description(network), **_free(notes)}
    header |= channels_notes(network.module) | structure_notes(network.module)
    write_safetensors(_contiguous(network.module.state_dict()), path, header)


def save_quantized(
    path: Path, qnetwork: nn.Module, network: Network | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write a quantized network: weights, quantizers, bits and schemes.

    Args:
        path: The file, ending in .safetensors.
        qnetwork: What `quantizers.quantize` made, at its present bits.
        network: The network that it is of, by whose name it can be built again. Without it, or where its name is a function
            of one's own, `load_quantized` wants the float network.
        notes: What else the header says, under names that aren't among `RESERVED` (of a run's signature: "run.network").
    """
    header = {"format": QUANTIZED_FORMAT}
    if network is not None:
        header |= _description(network)
    header["policy"] = json.dumps(Q.get_policy(qnetwork).to_dict())
    header["schemes"] = json.dumps(Q.scheme_records(qnetwork))
    header["structure"] = structure(qnetwork)
    if Q.residual_quantizers(qnetwork):
        header["residuals"] = json.dumps(Q.residual_places(qnetwork))
    header |= channels_notes(qnetwork) | structure_notes(qnetwork)
    header |= _free(notes)
    tensors = _contiguous(qnetwork.state_dict())
    for key, tensor in _contiguous(Q.quantizer_state(qnetwork)).items():
        tensors[f"{QUANTIZER}{key}"] = tensor
    write_safetensors(tensors, path, header)


def load_quantized(path: Path, module: nn.Module | None = None) -> nn.Module:
    """Load the quantized network of a file, at its bits, in evaluation mode.

    Args:
        path: The file.
        module: The float network that it is of, which stays as it is; of one with fewer channels the one with
            all of them. None: the one of the name in the file.

    Returns:
        The quantized network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that holds no quantized network, or one of another network, of an older format or of a newer
            version; and for a network of somebody's own that isn't given.
    """
    header = read_header(path)
    _check_quantized(header)
    policy, schemes = _policy_and_schemes(header)
    if module is None:
        module = _named_module(header)
    module = _with_structure(header, _with_channels(header, module))
    expected = module.state_dict()
    _check_shapes(path, float_tensors(header.shapes), _shapes(expected))
    _check_structure(header, module)
    # Weights, scales, and what schemes keep: never several times the network.
    held = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    check_file(path, 4 * held + 2**24)
    tensors, _ = read_state(path)
    state = {key.removeprefix(QUANTIZER): tensor for key, tensor in tensors.items() if key.startswith(QUANTIZER)}
    weights = float_tensors(tensors)
    try:
        qnetwork = Q.quantize(_with_residuals(header, module), policy, scheme=schemes, state=state)
        _check_tensors(Q.quantizer_state(qnetwork), state)
        _check_meaning(qnetwork, state)
        _check_tensors(qnetwork.state_dict(), weights)
    except _WRONG as error:
        raise ValueError(f"{path} holds tensors, bits or schemes that aren't of its network: {_short(error)}") from error
    qnetwork.load_state_dict(weights)
    return qnetwork.eval()


def structure(network: nn.Module) -> str:
    """Hash what a network is beside its tensors: the names and classes of its modules, and attributes such as a stride.

    A quantized network has that of the float network that it was made of. Of modules that aren't torch's, whole numbers and
    truth values are left out: they may count, or remember what happened.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        if isinstance(module, ResidualQuantizer | ResidualQuantizers):
            continue
        kind = plain_class(module)
        if isinstance(module, QuantLayer):
            kind = float_class(module)
        constants = set(getattr(kind, "__constants__", ()))
        attributes = {}
        for key, value in vars(module).items():
            if key.startswith("_") or key in UNSIGNED or key in OWN_ATTRIBUTES:
                continue
            if key in constants or (isinstance(value, (float, str)) and not kind.__module__.startswith("torch.")):
                attributes[key] = value
        plain = {key: _plain(value) for key, value in attributes.items() if _plain(value) is not None}
        digest.update(json.dumps([name, kind.__name__, plain], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _plain(value: object) -> str | None:
    """Write numbers, text and sequences of them as text; None for anything else."""
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        if None in parts:
            return None
        return f"({', '.join(map(str, parts))})"
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    return None


def holds_quantized(path: Path) -> bool:
    """Say whether a file holds a quantized network, of whatever version.

    Args:
        path: The file; only its header is read.

    Returns:
        False for anything but safetensors.
    """
    if path.suffix != ".safetensors":
        return False
    notes = read_header(path).notes
    return "schemes" in notes or notes.get("format", "").startswith(("haq-network-", "haq-quantized-"))


def load_checkpoint(path: Path) -> Network:
    """Build the float network of a checkpoint again; of a quantized one, the network before it was quantized.

    Args:
        path: The file.

    Returns:
        The network, with the weights of the file.

    Raises:
        ValueError: With the reason, if the file is truncated, holds code, or doesn't say which network it is of.
    """
    header = _header_of_any(path)
    if not re.fullmatch(r"haq-(checkpoint|network|quantized)-[0-9]+", header.notes.get("format", "")):
        raise ValueError(
            f"{path} doesn't say which network it is of (no {CHECKPOINT_FORMAT!r} in its header); "
            f"name the network: NAME@{path}"
        )
    if holds_quantized(path):
        _check_quantized(header)
    else:
        check_schema(path, header.notes["format"], CHECKPOINT_FORMAT, "a checkpoint of ours")
    return restore(_named_network(header), path)


def restore(network: Network, path: Path) -> Network:
    """Fill a network with the weights of a checkpoint of ours, and take what it says of images.

    Args:
        network: The network, with any weights, which are replaced.
        path: The checkpoint.

    Returns:
        The network, with the image size, mean and deviation of the checkpoint.

    Raises:
        ValueError: For a checkpoint of another network.
    """
    header = read_header(path)
    _, shape, mean, std = _images(header)
    network = replace(network, module=_with_structure(header, _with_channels(header, network.module)))
    _check_shapes(path, float_tensors(header.shapes), _shapes(network.module.state_dict()))
    if header.notes.get("format") == QUANTIZED_FORMAT:
        _check_structure(header, network.module)
    load_state(network.module, read_state(path)[0], path)
    return replace(network, input_shape=shape, mean=mean, std=std, origin=str(path))


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load the tensors of a file into a float network. Raises ValueError if they are of another one, or not finite.

    Args:
        module: The network.
        tensors: Those of the file, by name.
        path: The file, for messages.
    """
    expected = module.state_dict()
    state = unwrapped(float_tensors(tensors), expected)
    _check_shapes(path, _shapes(state), _shapes(expected))
    for key, value in state.items():
        is_float = expected[key].is_floating_point()
        if is_float != (value.dtype in FLOATS) or (not is_float and value.dtype != expected[key].dtype):
            raise ValueError(f"{path} holds {key} as {value.dtype}; the network has it as {expected[key].dtype}")
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds values that are not finite in {', '.join(map(printable, bad[:3]))}")
    negative = [key for key, value in state.items() if key.endswith("running_var") and (value < 0).any()]
    if negative:
        raise ValueError(f"{path} holds negative values in {printable(negative[0])}, a variance")
    module.load_state_dict(state)


def check_can_be_of(path: Path, given: Mapping[str, Any], name: str, classes: int | None) -> None:
    """Raise ValueError if tensors are of another network than a name says, before one is made a thousand times as large.

    Args:
        path: Their file, for messages.
        given: The tensors by name, or their shapes.
        name: The network's.
        classes: The number of outputs; None for the network's own.
    """
    _check_can_be(path, given, shapes_of(name, classes))


def _check_can_be(path: Path, given: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]] | None) -> None:
    """Raise ValueError unless tensors have the shapes that are expected, if those are known."""
    if expected is not None:
        state = unwrapped(float_tensors(given), expected)
        _check_shapes(path, {key: tuple(getattr(one, "shape", one)) for key, one in state.items()}, expected)


def _check_can_be_smaller(path: Path, given: Mapping[str, Shape], expected: Mapping[str, Shape] | None) -> None:
    """Raise ValueError unless tensors can be those of a network of fewer channels, before that is made with all of them.

    Args:
        path: Their file, for messages.
        given: The shapes of the file's tensors.
        expected: The shapes with all channels; None if they aren't known.
    """
    if expected is None:
        return
    shapes = float_tensors(given)
    if wrong := sorted(set(shapes) ^ set(expected)):
        raise ValueError(
            f"{path} is a checkpoint of another network: {printable(wrong[0][:100])} is in one of the two only; so are "
            f"{len(wrong)} in all"
        )
    _check_share(path, shapes, expected)


def _check_share(path: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape] | None) -> None:
    """Raise ValueError unless tensors hold a fair share of what the whole network does, which is made to read them."""
    if expected is None:
        return
    held, whole = (sum(math.prod(shape) for shape in those.values()) for those in (shapes, expected))
    if whole > MOST_PRUNED * held + MOST_WHOLE:
        raise ValueError(
            f"{path} names a network of {whole:,} values, and holds {held:,}: that isn't what fewer channels leave"
        )


def unwrapped(state: dict[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what DataParallel and torch.compile put before every name of a state dict.

    Args:
        state: The state dict.
        expected: That of the network, whose own names may begin so.

    Returns:
        The state dict under the names of the network.
    """
    while not set(state) & set(expected):
        prefixes = [prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in state)]
        if not prefixes or not state:
            break
        state = {key.removeprefix(prefixes[0]): value for key, value in state.items()}
    return state


def float_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what belongs to quantizers."""
    return {key: value for key, value in tensors.items() if not key.startswith(QUANTIZER)}


def read_header(path: Path) -> Header:
    """Read what a safetensors file says of itself, without its tensors.

    Args:
        path: The file.

    Returns:
        Its notes, and the shape of every tensor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated or of another kind.
    """
    _check_there(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except _UNREADABLE as error:
        raise _unreadable(path) from error
    return Header(path, notes, shapes)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a checkpoint's tensors and header, from safetensors or a torch file, without running anything in it.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the notes of the header; a torch file has none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, of another kind, or holds code.
    """
    _check_there(path)
    if path.suffix != ".safetensors":
        return _read_torch(path), {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _unreadable(path) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a torch file: a state dict, or one within what training scripts save."""
    try:
        state = torch_files.load(path, MOST_FILE)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors (code, perhaps) and was not opened; save its state_dict()"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    for _ in STATE_KEYS:
        inside = [key for key in STATE_KEYS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        if inside:
            state = state[inside[0]]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict of tensors but {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{path} holds no state dict: one of its keys is {quoted(key)}, not the name of a tensor")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state dict of tensors: {quoted(key)} is {kind_of(value)}")
    return dict(state)


def _check_there(path: Path) -> None:
    """Raise an error unless a path is a checkpoint that can be opened: an ordinary file, its header of a size that is read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    check_file(path, MOST_FILE)
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > min(MOST_HEADER, path.stat().st_size):
            raise _unreadable(path)


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors with notes, beside and renamed; the same bytes for the same content.

    Args:
        tensors: Contiguous tensors by name.
        path: The file; its folder is made.
        metadata: Notes in the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(tensors, metadata)
    # The library leaves the notes in an order of its own, another one in every process.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)  # tensors are aligned
    write(path, len(ordered).to_bytes(8, "little") + ordered + content[8 + size :])


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _description(network: Network) -> dict[str, str]:
    """Put what is needed to build a network again into text; of NAME@PATH, the name."""
    description = {
        "network": split_name(network.name)[0] or network.name,
        "input_shape": json.dumps(network.input_shape),
        "mean": json.dumps(network.mean),
        "std": json.dumps(network.std),
    }
    # A network that returns something else than class scores is built with as many outputs as it has.
    with suppress(ValueError):
        description["classes"] = str(output_count(network))
    return description


def _free(notes: Mapping[str, str] | None) -> dict[str, str]:
    """Check the notes of whoever saves. Raises ValueError for names that the format has for itself."""
    free = dict(notes or {})
    if taken := sorted(set(free) & set(RESERVED)):
        raise ValueError(f"a note can't be named {taken[0]!r}: the header of a checkpoint has that itself")
    return free


def _check_quantized(header: Header) -> None:
    """Raise ValueError, with what to do, unless a file is a quantized network of this version's format."""
    path = header.path
    found = header.notes.get("format", "")
    if found == CHECKPOINT_FORMAT and "schemes" not in header.notes:
        raise ValueError(f"{path} holds a float network, not a quantized one")
    if found in (CHECKPOINT_FORMAT, "haq-quantized-1", "haq-network-1"):
        raise ValueError(
            f"{path} was made by an older version of haq ({found}, this one reads {QUANTIZED_FORMAT}): make it again, by "
            "python -m haq.finetune RUN for a run's, or python -m haq.train"
        )
    check_schema(path, found, QUANTIZED_FORMAT, "a quantized network")


def _check_structure(header: Header, module: nn.Module) -> None:
    """Raise ValueError unless a quantized file is of a network with the modules of a float network."""
    found = header.notes.get("structure", "")
    if not re.fullmatch(r"[0-9a-f]{16}", found):
        raise ValueError(f"{header.path} has a header that doesn't say of which structure its network is: {quoted(found)}")
    if found != structure(module):
        raise ValueError(
            f"{header.path} is of another network, with the same tensors: the class of a module differs, or an attribute such "
            "as a stride or a padding; give the network that it was made of"
        )


def _policy_and_schemes(header: Header) -> tuple[Q.BitPolicy, dict[str, Q.Scheme]]:
    """Read the bits and schemes of a header. Raises ValueError for what are none."""
    try:
        for name in ("policy", "schemes"):
            _check_length(header, name, MOST_NOTE)
        policy = Q.BitPolicy.from_dict(json.loads(header.notes["policy"]))
        records = json.loads(header.notes["schemes"])
        _import_trusted_schemes(header.path, records)
        schemes = Q.schemes_from_records(records)
    except trust.UntrustedError:
        raise
    except _WRONG as error:
        raise ValueError(f"{header.path} has a header without bits and schemes: {_short(error)}") from error
    return policy, schemes


def _with_residuals(header: Header, module: nn.Module) -> nn.Module:
    """Return a float network with residual quantizers where the network of a file has some."""
    if "residuals" not in header.notes or Q.residual_quantizers(module):
        return module
    _check_length(header, "residuals", MOST_NOTE)
    places = json.loads(header.notes["residuals"])
    if not isinstance(places, dict):
        raise ValueError("its residuals are no places by module")
    return Q.insert_residual_quantizers(module, places=places)


def _with_channels(header: Header, module: nn.Module) -> nn.Module:
    """Return a float network with the channels that the network of a file keeps.

    Args:
        header: Of the file.
        module: The network.

    Returns:
        A smaller copy; the network itself where the file is of one with all channels.

    Raises:
        ValueError: For channels that can't be kept, and for tensors of sizes that don't go with them.
    """
    if CHANNELS not in header.notes:
        return module
    try:
        for name in (CHANNELS, SIZES):
            _check_length(header, name, MOST_NOTE)
        return shrunk(module, float_tensors(header.shapes), read_channels(header.notes))
    except _WRONG as error:
        raise ValueError(f"{header.path} isn't of this network with fewer channels: {_short(error)}") from error


def _with_structure(header: Header, module: nn.Module) -> nn.Module:
    """Return a float network without the blocks that the network of a file lost, and with the groups that it learned.

    Args:
        header: Of the file.
        module: The network, with the channels of the file's.

    Returns:
        A copy; the network itself where the file tells of neither.

    Raises:
        ValueError: For blocks and groups that aren't of this network.
    """
    try:
        if BLOCKS in header.notes:
            _check_length(header, BLOCKS, MOST_NOTE)
            module = without_blocks(module, read_blocks(header.notes[BLOCKS]))
        if GROUPINGS in header.notes:
            _check_length(header, GROUPINGS, MOST_NOTE)
            module = regrouped(module, read_groupings(header.notes[GROUPINGS]))
    except _WRONG as error:
        raise ValueError(f"{header.path} isn't of this network with other layers: {_short(error)}") from error
    return module


def _import_trusted_schemes(path: Path, records: object) -> None:
    """Make the schemes known that records name as `module:Name`, as far as whoever runs this has named them too."""
    if not isinstance(records, Mapping):
        return
    for record in records.values():
        if not isinstance(record, Mapping):
            continue
        name = record.get("name")
        if isinstance(name, str) and ":" in name and name not in Q.Scheme.known:
            trust.check(name, f"{path} names scheme")
            Q.Scheme.named(name)


def _named_module(header: Header) -> nn.Module:
    """Build the float network that a header names; without a name, say what to give."""
    if "network" not in header.notes:
        raise ValueError(
            f"{header.path} doesn't say which network it is of: give the float network, load_quantized(path, module=network)"
        )
    try:
        return _named_network(header).ordered().module
    except ValueError as error:
        raise ValueError(f"{error}; or give the float network, load_quantized(path, module=network)") from error


def _named_network(header: Header) -> Network:
    """Build the network that a header names, with random weights, in the size that it says."""
    classes, shape, mean, std = _images(header)
    name = header.notes.get("network", "")
    if not name:
        raise ValueError(f"{header.path} doesn't say which network it is of; name the network: NAME@{header.path}")
    try:
        expected = shapes_of(name, classes)
    except ValueError as error:
        raise ValueError(f"{header.path} names a network that can't be built: {error}") from error
    if GROUPINGS in header.notes or BLOCKS in header.notes:
        _check_share(header.path, float_tensors(header.shapes), expected)
    elif CHANNELS in header.notes:
        _check_can_be_smaller(header.path, header.shapes, expected)
    else:
        _check_can_be(header.path, header.shapes, expected)
    network = build_as_file_says(header.path, name, classes)
    return replace(network, input_shape=shape, mean=mean, std=std)


def _images(header: Header) -> tuple[int | None, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Read classes, image size (C, H, W) or (), mean and deviation.

    Raises ValueError unless they can be of the file's tensors.
    """
    try:
        for name in ("classes", "input_shape", "mean", "std"):
            _check_length(header, name, MOST_SHORT_NOTE)
        classes = None
        if "classes" in header.notes:
            classes = int(header.notes["classes"])
        for name in ("input_shape", "mean", "std"):
            if name not in header.notes:
                raise ValueError(f"it has no {name}")
        shape, mean, std = (json.loads(header.notes[key]) for key in ("input_shape", "mean", "std"))
        if shape != [] and not _is_shape(shape):
            raise ValueError(f"images of {quoted(header.notes['input_shape'])}, at most 3x800x800 are accepted")
        # No network tells more classes apart than one of its tensors has rows.
        tensors = [rows for rows in header.shapes.values() if 0 not in rows]
        if classes is not None and not (0 < classes <= MOST_CLASSES and any(classes in rows for rows in tensors)):
            raise ValueError(f"{quoted(classes)} classes")
        channels = 1
        if shape:
            channels = shape[0]
        if not _are_numbers(mean, channels):
            raise ValueError(f"mean {quoted(header.notes['mean'])}; one finite number is accepted, or one a channel")
        if not _are_numbers(std, channels) or min(std) < 1 / MOST_VALUE:
            raise ValueError(f"std {quoted(header.notes['std'])}; one number above 0 is accepted, or one a channel")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{header.path} has a header that describes no network of its tensors: {_short(error)}") from error
    return classes, tuple(shape), tuple(map(float, mean)), tuple(map(float, std))


def _check_length(header: Header, name: str, most: int) -> None:
    """Raise ValueError for a note that is longer than any of ours."""
    if len(header.notes.get(name, "")) > most:
        raise ValueError(f"its {name} has {len(header.notes[name]):,} characters, at most {most:,} are read")


def _is_shape(value: object) -> bool:
    """Say whether a value is the size of images (C, H, W) that a network may take."""
    if not isinstance(value, list) or len(value) != 3 or not all(type(size) is int and size > 0 for size in value):
        return False
    return math.prod(value) <= MOST_VALUES and math.prod(value[1:]) <= MOST_AREA


def _are_numbers(values: object, channels: int) -> bool:
    """Say whether values are finite numbers, one for all channels or one for each."""
    if not isinstance(values, list) or len(values) not in (1, channels):
        return False
    return all(type(value) in (int, float) and abs(value) < MOST_VALUE for value in values)


def _header_of_any(path: Path) -> Header:
    """Read the header of a checkpoint; a torch file has none, and is only checked to hold tensors."""
    if path.suffix == ".safetensors":
        return read_header(path)
    tensors, notes = read_state(path)
    return Header(path, notes, _shapes(tensors))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check_shapes(path: Path, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a file has the tensors of a network, in their shapes."""
    missing = [key for key in expected if key not in given]
    foreign = [key for key in given if key not in expected]
    shapes = [key for key in given if key in expected and given[key] != expected[key]]
    if missing or foreign or shapes:
        raise ValueError(
            f"{path} is a checkpoint of another network: {len(missing)} tensors missing{_first(missing)}, "
            f"{len(foreign)} unknown{_first(foreign)}, {len(shapes)} of another shape{_first(shapes)}"
        )


def _check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless tensors have the names, shapes and types that are expected, and finite values."""
    if wrong := sorted(set(expected) ^ set(given)):
        raise ValueError(f"{wrong[0]} is missing, or is one too many; {len(wrong)} are")
    for name, tensor in given.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {expected[name].dtype} of "
                f"{tuple(expected[name].shape)}"
            )
        if name.endswith(FINITE) and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def _check_meaning(qnetwork: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, for one of a scheme whose values mean nothing.

    Args:
        qnetwork: The quantized network, whose schemes these are.
        state: The tensors of its quantizers, as `quantizers.quantizer_state` has them.
    """
    for layer, quantized in Q.quant_layers(qnetwork).items():
        for key in quantized.state_names:
            name = f"{layer}.{key}"
            tensor = state[name]
            if key.endswith(STEPS):
                # Of a step that is learned, the magnitude counts.
                if key in quantized.scheme.learned:
                    tensor = tensor.abs()
                if not (tensor > 0).all():
                    raise ValueError(f"{name} has the value {tensor.min().item():g}; a scale must be above 0")
            if key == "activation_zero_point" and not _are_zero_points(tensor):
                raise ValueError(f"{name} has a zero point that is no integer from 0 to 2^b - 1 of its width b")
            if key == "activation_signed" and not ((tensor == 0) | (tensor == 1)).all():
                raise ValueError(f"{name} is {tensor.flatten()[0].item():g}; it must be 0 or 1")


def _are_zero_points(tensor: Tensor) -> bool:
    """Say whether a tensor has an integer for each width, of those that the width has."""
    most = 2.0 ** torch.tensor(Q.WIDTHS[: len(tensor)]) - 1
    return bool(((tensor == tensor.round()) & (tensor >= 0) & (tensor <= most)).all())


def _first(names: list[str]) -> str:
    if not names:
        return ""
    return f" (such as {printable(names[0][:100])})"


def _short(error: BaseException) -> str:
    return printable(" ".join(str(error).split())[:200])


def _unreadable(path: Path) -> ValueError:
    # What the library says of a file may be what stands in it.
    return ValueError(f"{path} can't be read as a checkpoint: it is truncated or of another kind")
