"""What a report says of a run under attack, in the words of the commands that attacked it."""

from __future__ import annotations

from haq.reporting import comparisons
from haq.reporting.sections import Section, Table
from haq.store.records import AttackedRecord, RobustnessRecord
from haq.store.units import percent


def attacked(found: RobustnessRecord) -> Section:
    """What the robustness command prints, in its words."""
    networks = found.networks
    names = list(networks)
    attacks = list(dict.fromkeys(attack for one in networks.values() for attack in one.attacks))
    rows = [["none", *(_tenth(one.clean) for one in networks.values())]]
    rows += [[attack, *(_tenth(one.attacks.get(attack)) for one in networks.values())] for attack in attacks]
    rows.append(
        ["worst case, image by image", *(f"{'<= ' if one.masked else ''}{_tenth(one.worst)}" for one in networks.values())]
    )
    checks = list(dict.fromkeys(check.name for one in networks.values() for check in one.checks))
    held = [{check.name: check.passed for check in one.checks} for one in networks.values()]
    words = {True: "PASS", False: "FAIL", None: "–"}
    masked = [name for name, one in networks.items() if one.masked]
    given = "rounded to 8 bits" if found.requantized_input else "as the attacker made them"
    sentence = (
        f"The attacker may change any of {found.images:,} test images of {found.data} within {found.threat}, and knows "
        f"weights, bits and quantizers; gradients by {found.backward}. Attacks: {found.attacks}, seed {found.seed}. Networks "
        f"get images {given}. The number that counts is the worst case over all attacks, image by image."
    )
    points = []
    for name, one in networks.items():
        points += [f"{name}: FAIL: {check.name}: {check.figures}." for check in one.checks if not check.passed]
        points.append(f"{name}: {_tenth(one.worst)}, {one.verdict}.")
        points += [f"{name}, as an integer network: {_deployed(one)}"] if one.deployed else []
    return Section(
        "Under attack",
        f"Masked gradients: of {' and '.join(masked)} the worst case is an upper bound, no assurance." if masked else "",
        [sentence],
        points,
        [comparisons.attacked(found)],
        [
            Table(f"Accuracy under attack, measured, {found.threat}", ["attack", *names], rows),
            Table(
                "Signs of masked gradients",
                ["what should hold", *names],
                [[check, *(words[one.get(check)] for one in held)] for check in checks],
            ),
            Table("Networks", ["network", "what it is"], [[name, one.note] for name, one in networks.items()], words=True),
        ],
    )


def _deployed(one: AttackedRecord) -> str:
    assert one.deployed is not None
    if one.deployed.reason:
        return one.deployed.reason
    share = None
    if one.deployed.images:
        share = one.deployed.right / one.deployed.images
    return (
        f"{_tenth(share)} right on its worst images, another answer than in PyTorch on {one.deployed.different} of "
        f"{one.deployed.images:,}."
    )


def verified(one: AttackedRecord) -> Section:
    failed = "; ".join(f"{check.name}: {check.figures}" for check in one.checks if not check.passed)
    return Section(
        "Verified under attack by the search",
        "Masked gradients: the worst case is an upper bound, no assurance." if one.masked else "",
        [
            f"By the full suite on {one.images:,} test images: {percent(one.worst)} right in the worst case, "
            f"{one.verdict}{f' ({failed})' if failed else ''}."
        ],
    )


def _tenth(share: float | None) -> str:
    return percent(share, 1)
