"""Which attacks are run: from an effort, or names, to attacks made for a network.

Importing this imports neither torch nor foolbox; making attacks does.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from haq.attacks import ATTACKS
from haq.attacks.base import ATTACK_BUDGETS, BACKWARD, AttackSetup, EvaluationAttack, effort_of, split_names
from hw_models.registry import printable

if TYPE_CHECKING:
    from haq.attacks.classifier import Classifier
    from haq.attacks.threat_model import ThreatModel

TRANSFER = "transfer-"  # begins the names of attacks that are made on another network


def check_names(names: str) -> None:
    """Raise ValueError for names that nothing has, before anything is loaded.

    From which networks there is something to transfer, only `suite` can tell.

    Args:
        names: An effort, or names of attacks, divided by commas.

    Raises:
        ValueError: For an unknown name, with those that are close, for two efforts, and for an attack of somebody else's
            that lacks something.
        ImportError: For one that can't be imported.
    """
    effort_of(names)
    for name in split_names(names):
        if name in ATTACK_BUDGETS:
            for known in ATTACKS:
                ATTACKS.get(known)
        elif name in ATTACKS or ":" in name:
            ATTACKS.get(name)
        elif not name.startswith(TRANSFER):
            raise ValueError(_unknown(name, ATTACKS.names()))


def suite(
    names: str,
    victim: Classifier,
    threat: ThreatModel,
    classes: int,
    *,
    sources: Mapping[str, Classifier] | None = None,
    backward: str = "ste",
) -> list[EvaluationAttack]:
    """Make the attacks of an effort, or those of some names, for a network.

    An effort's attacks need no asking: one that makes no sense for the victim is left out, as are the DLR losses where there
    are too few classes. What is asked for by name must be there.

    Args:
        names: `quick`, `standard` or `full`, names of attacks, or both, divided by commas. Names alone take the budget of
            the standard effort.
        victim: The network that is attacked.
        threat: What the attacker may do.
        classes: How many the victim tells apart.
        sources: Networks to transfer attacks from, by name.
        backward: How gradients pass the victim's quantized inputs, one of `BACKWARD`; it changes nothing for a float network.

    Returns:
        The attacks, in the order in which they are to be run: an effort's first.

    Raises:
        ValueError: For unknown names and modes, and for an attack by name that needs more classes.
    """
    if backward not in BACKWARD:
        raise ValueError(f"unknown backward mode {backward!r}; known: {', '.join(BACKWARD)}")
    budget = ATTACK_BUDGETS[effort_of(names)]
    setup = AttackSetup(victim, threat, budget, classes, sources or {}, backward)
    asked = split_names(names)
    plan: list[EvaluationAttack] = []
    for name in asked:
        if name in ATTACK_BUDGETS:
            plan += _of_effort(name, setup)
    for name in asked:
        if name not in ATTACK_BUDGETS:
            plan += _by_name(name, setup)
    # Asked for twice, an attack is run once.
    first = {attack.name: attack for attack in reversed(plan)}
    return [attack for attack in plan if first[attack.name] is attack]


def _of_effort(effort: str, setup: AttackSetup) -> list[EvaluationAttack]:
    """Make the attacks that an effort includes, as far as there are enough classes."""
    plan = []
    for name in ATTACKS:
        kind = ATTACKS.get(name)
        if effort in kind.efforts and setup.classes >= kind.least_classes:
            plan += kind.make(name, setup)
    return plan


def _by_name(asked: str, setup: AttackSetup) -> list[EvaluationAttack]:
    """Make the attack of a name: of one that is registered, of a source (`transfer-NAME`), or of `module:Name`."""
    known = [*ATTACKS.names(), *(f"{TRANSFER}{source}" for source in setup.sources)]
    if asked not in known and ":" not in asked:
        raise ValueError(_unknown(asked, known))
    name = asked
    if asked not in ATTACKS and asked.startswith(TRANSFER):
        name = TRANSFER.rstrip("-")
    kind = ATTACKS.get(name)
    if setup.classes < kind.least_classes:
        raise ValueError(
            f"{asked} needs at least {kind.least_classes} classes, the network has {setup.classes}: use pgd and apgd-ce"
        )
    made = [attack for attack in kind.make(name, setup) if asked in (name, attack.name)]
    if not made:
        raise ValueError(f"{_unknown(asked, known)} (there is such an attack, but not on this network)")
    return made


def _unknown(name: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name, [*ATTACK_BUDGETS, *known], n=2, cutoff=0.5)
    meant = ""
    if close:
        meant = f"; did you mean {' or '.join(close)}?"
    ways = [*known, "transfer-NAME", "module:Name"]
    return printable(f"unknown attack {name!r}; known: {', '.join(ATTACK_BUDGETS)}, or some of {', '.join(ways)}{meant}")
