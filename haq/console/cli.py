"""The options of commands that still use argparse."""

from __future__ import annotations

import argparse

from haq.console.errors import EXIT_BAD_INPUT as EXIT_BAD_INPUT
from haq.console.errors import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from haq.console.errors import run_command as run_command
from haq.console.progress import Live as Live
from haq.console.progress import follow_loading as follow_loading
from haq.console.progress import follow_training as follow_training
from haq.console.progress import progress as progress


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The options of targets that are measured."""
    parser.add_argument("--threads", type=int, help="of measured kernels, for the targets cpu and rpc:HOST:PORT (default: 1)")
    parser.add_argument(
        "--target", metavar="JSON|PROCESSOR", help="TVM's target for measured kernels (default: this machine's processor)"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        default=None,
        help="measure kernels with their data out of the caches (default: in them)",
    )


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Where the workers are."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on a Ray cluster, on every processor or on as many as there are --workers: auto on one of its machines, "
        "HOST:PORT, or local (default: none)",
    )


def check_workers(options: argparse.Namespace) -> None:
    """Raise ValueError if --workers is no number of workers."""
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; it must be at least 1")


def describe_workers(options: argparse.Namespace) -> str:
    """Who works, in words."""
    if options.ray is not None:
        return f"by {options.workers or 'all'} processors of the Ray cluster {options.ray}"
    return "in this process" if options.workers is None else f"in {options.workers} processes"


def add_objective(parser: argparse.ArgumentParser, objective: str, eps: str) -> None:
    """What policies are judged by; the defaults are told."""
    parser.add_argument(
        "--objective",
        help="what a policy is judged by: accuracy; on images without labels, agreement with the float network; or "
        f"accuracy+robust, right both as images are and under a cheap attack (default: {objective})",
    )
    parser.add_argument(
        "--eps",
        help="of that attack: largest change of a pixel, on the scale of images in [0, 1], such as 8/255 or 0.03 "
        f"(default: {eps})",
    )


def check_eps(options: argparse.Namespace) -> None:
    """Raise ValueError if --eps is given without the objective that it belongs to."""
    if options.eps is not None and options.objective != "accuracy+robust":
        raise ValueError(f"--eps {options.eps} is of an attack: it goes with --objective accuracy+robust")
