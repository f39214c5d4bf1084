"""What a report says of a run under attack, in the words of the commands that attacked it."""

from __future__ import annotations

from haq.reporting import comparisons
from haq.reporting.sections import Section, Table
from haq.store.records import AttackedRecord, RobustnessRecord
from haq.store.units import percent

VERDICTS = {True: "PASS", False: "FAIL", None: "–"}


def attacked(found: RobustnessRecord) -> Section:
    """Tell what the robustness command prints, in its words."""
    networks = found.networks
    given = "as the attacker made them"
    if found.requantized_input:
        given = "rounded to 8 bits"
    sentence = (
        f"The attacker may change any of {found.images:,} test images of {found.data} within {found.threat}, and knows "
        f"weights, bits and quantizers; gradients by {found.backward}. Attacks: {found.attacks}, seed {found.seed}. Networks "
        f"get images {given}. The number that counts is the worst case over all attacks, image by image."
    )
    masked = [name for name, network in networks.items() if network.masked]
    stamp = ""
    if masked:
        stamp = f"Masked gradients: of {' and '.join(masked)} the worst case is an upper bound, no assurance."
    points = [point for name, network in networks.items() for point in _points(name, network)]
    notes = [[name, network.note] for name, network in networks.items()]
    return Section(
        "Under attack",
        stamp,
        [sentence],
        points,
        [comparisons.attacked(found)],
        [_accuracies(found), _checks(found), Table("Networks", ["network", "what it is"], notes, words=True)],
    )


def verified(network: AttackedRecord) -> Section:
    """Tell what the search itself found of its outcome under the full suite of attacks."""
    stamp, failed = "", ""
    if network.masked:
        stamp = "Masked gradients: the worst case is an upper bound, no assurance."
    reasons = [f"{check.name}: {check.figures}" for check in network.checks if not check.passed]
    if reasons:
        failed = f" ({'; '.join(reasons)})"
    sentence = (
        f"By the full suite on {network.images:,} test images: {percent(network.worst)} right in the worst case, "
        f"{network.verdict}{failed}."
    )
    return Section("Verified under attack by the search", stamp, [sentence])


def _accuracies(found: RobustnessRecord) -> Table:
    """Make the table of accuracies under every attack, a column for each network."""
    networks = found.networks.values()
    attacks = dict.fromkeys(attack for network in networks for attack in network.attacks)
    rows = [["none", *(_tenth(network.clean) for network in networks)]]
    rows += [[attack, *(_tenth(network.attacks.get(attack)) for network in networks)] for attack in attacks]
    rows.append(["worst case, image by image", *map(_worst, networks)])
    return Table(f"Accuracy under attack, measured, {found.threat}", ["attack", *found.networks], rows)


def _checks(found: RobustnessRecord) -> Table:
    """Make the table of signs of masked gradients."""
    held = [{check.name: check.passed for check in network.checks} for network in found.networks.values()]
    checks = dict.fromkeys(name for checked in held for name in checked)
    rows = [[check, *(VERDICTS[checked.get(check)] for checked in held)] for check in checks]
    return Table("Signs of masked gradients", ["what should hold", *found.networks], rows)


def _points(name: str, network: AttackedRecord) -> list[str]:
    """Say of a network what failed, its worst case, and how it does once it is deployed."""
    points = [f"{name}: FAIL: {check.name}: {check.figures}." for check in network.checks if not check.passed]
    points.append(f"{name}: {_tenth(network.worst)}, {network.verdict}.")
    if network.deployed is not None:
        points.append(f"{name}, as an integer network: {_deployed(network)}")
    return points


def _deployed(network: AttackedRecord) -> str:
    deployed = network.deployed
    assert deployed is not None
    if deployed.reason:
        return deployed.reason
    share = None
    if deployed.images:
        share = deployed.right / deployed.images
    return (
        f"{_tenth(share)} right on its worst images, another answer than in PyTorch on {deployed.different} of "
        f"{deployed.images:,}."
    )


def _worst(network: AttackedRecord) -> str:
    if network.masked:
        return f"<= {_tenth(network.worst)}"
    return _tenth(network.worst)


def _tenth(share: float | None) -> str:
    return percent(share, 1)
