"""Devices by name: what a user may ask for, what there is here, and over which of them workers are spread.

A name is read without torch, so that help and configurations don't wait for it; whether there is such a device is asked when
something is about to begin.
"""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING, Any

from haq.store.files import quoted

if TYPE_CHECKING:
    import torch

CPU = "cpu"
WRITTEN = "cpu, cuda, cuda:N or mps"


def check_device_name(name: str, option: str = "--device") -> str:
    """Return a name itself, if it is written as that of a device is.

    Args:
        name: The name.
        option: What it was given as, for the message.

    Returns:
        The name.

    Raises:
        ValueError: For anything else; whether there is such a device is for `find_device` to say.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z]+(:(0|[1-9][0-9]{0,3}))?", name):
        raise ValueError(f"{option} is {quoted(name)}; it must be {WRITTEN}")
    return name


def kind_of(name: str) -> str:
    """Return the kind of a device: that of cuda:1 is cuda."""
    return name.partition(":")[0]


def devices_of(kind: str) -> list[str]:
    """List the devices of a kind that are here, such as cuda:0 and cuda:1; there is one CPU."""
    import torch

    if kind == CPU:
        return [CPU]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != kind:
        return []
    return [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]


def available() -> list[str]:
    """List all devices that are here."""
    import torch

    found = [CPU]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found += devices_of(accelerator.type)
    return found


def find_device(name: str | torch.device, option: str = "--device") -> torch.device:
    """Find a device, or say which there are.

    Args:
        name: Such as "cpu", "cuda" (the first) or "cuda:1".
        option: What it was given as, for the message.

    Returns:
        The device, with its number, as tensors name theirs.

    Raises:
        ValueError: If there is none of that name here, naming those that are.
    """
    import torch

    name = check_device_name(str(name), option)
    found = devices_of(kind_of(name))
    exact = name
    if ":" not in name and found:
        exact = found[0]
    if name == f"{CPU}:0":
        exact = CPU
    if exact not in found:
        there = available()
        words = f"there is only {there[0]}"
        if len(there) > 1:
            words = f"there are {', '.join(there)}"
        raise ValueError(f"{option} is {quoted(name)}, which isn't here: {words}")
    compute_exactly(exact)
    return torch.device(exact)


def compute_exactly(device: str | torch.device) -> None:
    """Let a GPU compute in float32 what is float32, and convolutions the same each time, from now on in this process.

    By default convolutions keep 10 bits of every factor (TF32), where the integers of 8-bit layers need 15 in their products'
    sums: policies would be judged by what is no network of theirs.

    Args:
        device: What is computed on; for anything but "cuda" nothing is done.
    """
    import torch

    if kind_of(str(device)) != "cuda":
        return
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        # The older switches may not be mixed with these.
        for part in (cudnn.conv, cudnn.rnn, matmul):
            part.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
    cudnn.benchmark = False
    cudnn.deterministic = True


def spread(name: str) -> list[str]:
    """List the devices that workers are spread over: all of a kind ("cuda"), or the one that is named ("cuda:1")."""
    if ":" in name:
        return [name]
    return devices_of(name)


def describe_device(device: torch.device) -> str:
    """Name a device, and what it is: "cuda, NVIDIA H100 80GB HBM3"; results depend on both to the last bit."""
    import torch

    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"mps, {platform.machine()}, macOS {platform.mac_ver()[0]}"
    return device.type
