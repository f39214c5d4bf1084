"""What a search or a sweep is asked to do: the options of the commands, and what stands in config.yaml and sweep.json.

A field is an option: its name, default, help and check stand here and nowhere else. Importing this needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from haq import data, networks
from haq.attacks.threat_model import DEFAULT_EPS, parse_eps
from haq.console.options import option_name, setting
from haq.data.memory import parse_bytes
from haq.problem import CORRECTIONS, KINDS, OBJECTIVES, ROUNDINGS
from haq.problem.device import CPU, WRITTEN, check_device_name
from haq.solvers import ENVS, PLAN, SOLVERS
from haq.store import files
from haq.store.shell import command_line
from haq.store.units import UNITS
from haq.training.config import GIVE_UP_AFTER, SHARE_OF_USUAL
from haq.training.optimizers import OPTIMIZERS, SCHEDULES, check_optimizer, check_schedule
from hw_models import trust
from hw_models.registry import Registry

SEARCHED = "What is searched"
HARDWARE = "Hardware and budget"
SOLVING = "How it is searched"
TUNING = "Fine-tuning"
WORK = "Who works"
FOLDERS = "The run"
AGENT_TRAINING = "Training"
BENCH = "What is measured"

MEASURED = ("threads", "target", "cold")  # fields that go with targets that are measured
MOST_BUDGETS = 1000
DEVICE_KINDS = (CPU, "cuda", "mps")  # for a shell to complete
LARGEST_EXPONENT = 10
MOST_NAMED = 6  # names of code in a message
RATE_WORDS = "0.005, less where steps are few"
LINEAR = "linear"  # the scheme of what isn't given another
ADAROUND = "adaround"  # what rounds the weights of a single policy, with GPTQ for those that are searched
METHODS = ("train", "ptq")  # of fine-tuning
AGENTS = ("ddpg", "td3", "sac")  # that can be pretrained
OF_TRAINING = ("epochs", "learning_rate", "amp", "optimizer", "schedule", "patience")  # options of the first of them
NONE = "none"  # no correction
FLOAT = "float"
RESIDUALS = ("8", FLOAT)  # widths of what enters additions and average poolings
# How runs were quantized before these settings were there: such a run goes on as it began.
BEFORE = {"correction": NONE, "rounding": "nearest"}
# Settings that files have only where they were given, since most runs do without.
ONLY_IF_GIVEN = (
    "reference",
    "max_drop",
    "at_least",
    "tradeoff",
    "confirm",
    "trials",
    "evaluations",
    "iterate",
    "race",
    "agent",
    "prune",
    "criterion",
)
OF_YES_OR_NO = ("cold", "amp", "iterate", "race")
USUAL_CRITERION = "l1"  # by which channels are kept
HALF = "0.5"  # the budget, unless one is given
MOST_SEEDS = 1000  # of one benchmark
TRADEOFFS = ("soft", "hard")  # of MnasNet's objective, with the paper's constants


_Same = TypeVar("_Same", bound="_Config")


class _Config(BaseModel):
    """A frozen record of options, whose errors are one sentence."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        """Check the values. Raises ValueError, in one sentence, for the first that won't do."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self), error)) from None

    def replace(self: _Same, **changes: Any) -> _Same:
        """Return a copy with other values, checked; this one stays as it is."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by field."""
        return self.model_dump(mode="json")


def optimizer_setting(group: str) -> Any:
    """Make the option that names an optimizer, in a group of options."""
    return setting(
        OPTIMIZERS[0],
        "sgd, adam, or a class of torch.optim by name, such as AdamW",
        group=group,
        metavar="NAME",
        names=lambda: OPTIMIZERS,
    )


def schedule_setting(group: str) -> Any:
    """Make the option that names a schedule of the learning rate, in a group of options."""
    return setting(
        SCHEDULES[0],
        f"of the learning rate: {', '.join(SCHEDULES)}, or a class of torch.optim.lr_scheduler, such as "
        "StepLR,step_size=10,gamma=0.5",
        group=group,
        metavar="NAME",
        names=lambda: SCHEDULES,
    )


def forward_setting(group: str) -> Any:
    """Make the option that names a function which calls the network, in a group of options."""
    return setting(
        None,
        "module:function of (network, batch) that computes the outputs, where that takes more than calling the network with "
        "the inputs; a batch is (inputs, targets)",
        group=group,
        metavar="NAME",
        default_words="the network itself",
        names=lambda: (),  # it is code, that whoever types it may have imported
    )


class SearchConfig(_Config):
    """What a search is asked to do: the options of `haq search`."""

    network: str = setting(
        networks.DEFAULT,
        "a name as `haq list networks` shows them, or module:Name",
        group=SEARCHED,
        metavar="NAME",
        names=lambda: networks.NETWORKS.names(),
    )
    data: str = setting(
        data.DEFAULT,
        "a name as `haq list data` shows them, or module:Name",
        group=SEARCHED,
        metavar="NAME",
        names=lambda: data.DATASETS.names(),
    )
    search_images: int | None = setting(
        None,
        "samples that policies are judged on, where they are cut from the train split",
        group=SEARCHED,
        least=1,
        metavar="N",
        default_words="a fifth of it; of photographs 2000 at most",
    )
    memory: str | None = setting(
        None,
        "that samples may take, such as 4GB or 500MB; what doesn't fit is read, or decoded, when it is needed",
        group=SEARCHED,
        metavar="AMOUNT",
        default_words="a quarter of the machine's",
    )
    mean: str | None = setting(
        None,
        "of the images that the network was trained on, of each channel and on the scale of images in [0, 1], such as "
        "0.485,0.456,0.406; one number stands for all channels",
        group=SEARCHED,
        metavar="NUMBERS",
        default_words="the network's own; 0 for module:Name",
    )
    std: str | None = setting(
        None,
        "their standard deviation",
        group=SEARCHED,
        metavar="NUMBERS",
        default_words="the network's own; 1 for module:Name",
    )
    forward: str | None = forward_setting(SEARCHED)
    hw: str = setting(
        "edge",
        "hardware target: a name as `haq list targets` shows them, a .yaml file, lut:TABLE.csv, cpu, onnxruntime or "
        "openvino (measured here), rpc:HOST:PORT (measured there) or module:Name",
        group=HARDWARE,
        metavar="NAME",
        names=lambda: target_names(),
    )
    metric: str = setting(
        "latency",
        f"what is limited or, with --max-drop and --at-least, lessened: {', '.join(UNITS)}",
        group=HARDWARE,
        metavar="NAME",
        names=lambda: UNITS,
        default_words="that of the first --budget that names one, or latency",
    )
    budget: str = setting(
        HALF,
        "of --metric, or METRIC=LIMIT: a fraction of the --reference, or an amount such as 0.8ms, 40kB; may be given several "
        "times, for a metric each",
        group=HARDWARE,
        metavar="LIMIT",
        default_words=f"{HALF}; {NONE} with --max-drop and --at-least",
        several=True,
    )
    reference: str | None = setting(
        None,
        "what budgets are fractions of: widths such as w16a16 or float for all layers, or a policy.json",
        group=HARDWARE,
        metavar="WIDTHS|FILE",
        default_words="8 bits, in layers that can't have them the widest that the target can do",
    )
    bits: str | None = setting(
        None,
        "widths that a solver may choose, such as 2:8, 4,8,16 or 2:8,float; of weights/activations 4,8/8,16",
        group=HARDWARE,
        metavar="WIDTHS",
        default_words="2:8, and 16 and float where the target does them",
    )
    prune: str | None = setting(
        None,
        "search channels together with widths: the shares of its channels that a group may keep, LOW:HIGH such as 0.25:1 (of "
        "those that are multiples of 1/8) or a list such as 1,0.75,0.5",
        group=HARDWARE,
        metavar="SHARES",
        default_words="all channels are kept",
    )
    criterion: str | None = setting(
        None,
        "by which channels are kept, with --prune: a name as `haq list criteria` shows them, or module:Name",
        group=HARDWARE,
        metavar="NAME",
        names=lambda: known_criteria(),
        default_words=USUAL_CRITERION,
    )
    max_drop: float | None = setting(
        None,
        "find the cheapest policy that is at most so much worse than float on the search split: points of an objective in "
        "percent, its unit otherwise",
        group=HARDWARE,
        metavar="POINTS",
        default_words="the best policy within the budget",
    )
    at_least: str | None = setting(
        None,
        "find the cheapest policy whose objective is this or better, such as 91.5%",
        group=HARDWARE,
        metavar="VALUE",
    )
    tradeoff: str | None = setting(
        None,
        "find the policy with the most of objective x (cost / budget)^w, the budget being no limit then: soft or hard, with "
        "MnasNet's w, or its ALPHA,BETA, within the budget and above it",
        group=HARDWARE,
        metavar="KIND",
        names=lambda: TRADEOFFS,
    )
    scheme: str = setting(
        LINEAR,
        "how values become few-bit ones: a name as `haq list schemes` shows them, or module:Name; NAME,LAYER=NAME gives "
        "single layers others. First and last layer stay linear unless they are named",
        group=SEARCHED,
        metavar="NAME",
        names=lambda: known_schemes(),
    )
    rounding: str = setting(
        "nearest",
        "of weights: nearest; gptq, so that a layer's output changes least; or adaround, which is gptq in the search, and "
        "learned block by block for the policy that was found",
        group=SEARCHED,
        metavar="NAME",
        names=lambda: (*ROUNDINGS, ADAROUND),
    )
    correction: str = setting(
        "analytic",
        "of what rounding weights adds to a layer's mean output: analytic, or none",
        group=SEARCHED,
        metavar="NAME",
        names=lambda: (*CORRECTIONS, NONE),
    )
    residuals: str = setting(
        FLOAT,
        "of what additions and average poolings take: 8 bits, as runtimes want it that compute these in integers, or float",
        group=SEARCHED,
        metavar="WIDTH",
        names=lambda: RESIDUALS,
    )
    solver: str = setting(
        "ddpg",
        "a name as `haq list solvers` shows them, or module:Name",
        group=SOLVING,
        metavar="NAME",
        names=lambda: SOLVERS.names(),
    )
    evaluations: int | None = setting(
        None,
        "policies that a solver may evaluate",
        group=SOLVING,
        least=1,
        metavar="N",
        default_words="proposed from the number of layers and of their widths: 200 for 12 layers at 2:8 bits, 420 for 54",
    )
    iterate: bool = setting(
        False,
        "of ilp: go on after its first solution, with what adds up fitted to all trials, until nothing improves",
        group=SOLVING,
    )
    env: str = setting(
        PLAN,
        "of agents: plan (relative to a plan for what is left) or haq (HAQ's own)",
        group=SOLVING,
        metavar="NAME",
        names=lambda: ENVS,
    )
    agent: str | None = setting(
        None,
        "what haq pretrain wrote: the solver, an agent of that kind, starts from it (--env plan)",
        group=SOLVING,
        metavar="FILE",
        default_words="an agent that knows nothing yet",
    )
    ahead: int = setting(
        1,
        "policies that agents, surrogate, evolution and ilp --iterate choose before they learn what the first of them is "
        "worth, so that workers have something to do; results depend on it",
        group=SOLVING,
        least=1,
    )
    confirm: int | None = setting(
        None,
        "judge the best few policies again in the end, on so many samples of the train split, which are set apart for it: "
        "neither calibration nor fine-tuning sees them",
        group=SOLVING,
        least=1,
        metavar="N",
        default_words="none",
    )
    race: bool | None = setting(
        None,
        "end an evaluation as soon as a part of the images tells that the policy can't be among the best, where the solver "
        "knows how to go on with that and the objective's values are shares",
        group=SOLVING,
        spellings=("--no-race",),
        default_words="on",
    )
    seed: int = setting(0, "of everything random but the data's splits", group=SOLVING, least=0)
    finetune_epochs: int = setting(
        12,
        f"of the network that was found; it ends after {GIVE_UP_AFTER} steps if these come no nearer to the float network; 0 "
        "leaves fine-tuning out",
        group=TUNING,
        least=0,
    )
    finetune_steps: int = setting(0, "steps by which every policy is fine-tuned before it is judged", group=TUNING, least=0)
    learning_rate: float | None = setting(
        None, "of fine-tuning, at its highest", group=TUNING, metavar="RATE", default_words=RATE_WORDS
    )
    objective: str = setting(
        "accuracy",
        "what a policy is judged by, as `haq list objectives` shows them: accuracy; on images without labels, agreement with "
        "the float network; accuracy+robust, right both as images are and under a cheap attack; or module:Name, which may be "
        "a metric of torchmetrics or a function of (outputs, targets), or of a network, with an attribute higher_is_better",
        group=SEARCHED,
        metavar="NAME",
        spellings=("--reward",),
        names=lambda: OBJECTIVES.names(),
    )
    eps: str = setting(
        DEFAULT_EPS,
        "of that attack: largest change of a pixel, on the scale of images in [0, 1], such as 8/255 or 0.03",
        group=SEARCHED,
        metavar="SIZE",
    )
    sensitivity_kind: str = setting(
        "loss",
        f"what solvers know of single layers: {', '.join(KINDS)}; the last two cost no evaluation",
        group=SOLVING,
        metavar="NAME",
        names=lambda: KINDS,
    )
    sensitivity: str | None = setting(
        None,
        "take it from an earlier run of this network and data, for whatever target and budget, instead of measuring it",
        group=SOLVING,
        metavar="RUN|FILE",
    )
    trials: str | None = setting(
        None,
        "learn from earlier runs or sweeps of this network and data, for whatever target and budget; may be given several "
        "times, or parted by commas",
        group=SOLVING,
        metavar="RUN",
        several=True,
    )
    threads: int | None = setting(
        None,
        "of what is measured: cpu, rpc:HOST:PORT, onnxruntime, openvino",
        group=HARDWARE,
        metavar="N",
        default_words="1",
    )
    target: str | None = setting(
        None,
        "TVM's target for measured kernels, of cpu and rpc:HOST:PORT",
        group=HARDWARE,
        metavar="JSON|PROCESSOR",
        default_words="this machine's processor",
    )
    cold: bool | None = setting(None, "measure with data out of the caches", group=HARDWARE, default_words="in them")
    device: str = setting(
        CPU,
        f"where networks are run: {WRITTEN}; with --workers, cuda is all GPUs",
        group=WORK,
        metavar="NAME",
        names=lambda: DEVICE_KINDS,
    )
    amp: bool = setting(False, "fine-tune in mixed precision, float16 or bfloat16 where that does no harm", group=TUNING)

    @model_validator(mode="before")
    @classmethod
    def _drop_the_usual_budget(cls, values: Any) -> Any:
        """Leave out the budget that a search has by default, where the cheapest policy is looked for."""
        if isinstance(values, Mapping) and "budget" not in values and is_cheapest(values):
            return {**values, "budget": NONE}
        return values

    @field_validator("solver")
    @classmethod
    def _check_solver(cls, name: str) -> str:
        return check_name(SOLVERS, name)

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, name: str) -> str:
        return check_name(OBJECTIVES, name)

    @field_validator("env")
    @classmethod
    def _check_env(cls, name: str) -> str:
        if name not in ENVS:
            raise ValueError(f"unknown environment {name!r}; known: {', '.join(ENVS)}")
        return name

    @field_validator("sensitivity_kind")
    @classmethod
    def _check_kind(cls, name: str) -> str:
        if name not in KINDS:
            raise ValueError(f"unknown kind of sensitivities {name!r}; it can be {', '.join(KINDS)}")
        return name

    @field_validator("rounding")
    @classmethod
    def _check_rounding(cls, name: str) -> str:
        if name not in (*ROUNDINGS, ADAROUND):
            raise ValueError(f"unknown rounding {name!r}; it can be {', '.join((*ROUNDINGS, ADAROUND))}")
        return name

    @field_validator("correction")
    @classmethod
    def _check_correction(cls, name: str) -> str:
        if name not in (*CORRECTIONS, NONE):
            raise ValueError(f"unknown correction {name!r}; it can be {', '.join((*CORRECTIONS, NONE))}")
        return name

    @field_validator("residuals")
    @classmethod
    def _check_residuals(cls, width: str) -> str:
        if width not in RESIDUALS:
            raise ValueError(f"--residuals is {files.quoted(width)}; it can be {' or '.join(RESIDUALS)}")
        return width

    @field_validator("device")
    @classmethod
    def _check_device(cls, name: str) -> str:
        return check_device_name(name)

    @property
    def searched_rounding(self) -> str:
        """Return the rounding with which policies are evaluated."""
        if self.rounding == ADAROUND:
            return "gptq"
        return self.rounding

    @model_validator(mode="after")
    def _check_together(self) -> SearchConfig:
        if self.seed >= 2**32:
            raise ValueError(
                f"--seed is {self.seed}; it must be an integer from 0 to {2**32 - 1}, which every generator takes"
            )
        if self.memory is not None:
            parse_bytes(self.memory)
        self.check_bits()
        self.check_pruning()
        self.check_reference()
        if self.agent is not None and self.env != PLAN:
            raise ValueError(
                f"--agent {files.quoted(self.agent)} knows what --env {PLAN} shows, and --env {self.env} shows something "
                "else: leave one of the two out"
            )
        self._check_goal()
        self.scheme_names()
        self.normalization()
        check_rate(self.learning_rate)
        parse_eps(self.eps)
        if self.eps != DEFAULT_EPS:
            _check_attacked(self.objective, self.eps)
        return self

    @classmethod
    def from_options(cls, given: Mapping[str, Any], file: Path | None = None) -> SearchConfig:
        """Make a configuration of the options that were given.

        Args:
            given: Values by field.
            file: The config.yaml of a run, for what wasn't given.

        Returns:
            The configuration.

        Raises:
            ValueError: For what isn't accepted, and for options that don't go together.
            FileNotFoundError: If there is no such file.
        """
        given = _with_metric(given)
        if file is not None:
            config = cls.from_file(file).replace(**given)
            config.check_code(file)
            return config
        if "eps" in given:
            _check_attacked(given.get("objective", cls.default("objective")), given["eps"])
        if given.get("sensitivity") and "sensitivity_kind" in given:
            raise ValueError("--sensitivity brings its kind along: leave --sensitivity-kind out")
        return cls(**given)

    @classmethod
    def from_file(cls, path: Path) -> SearchConfig:
        """Make a configuration of the config.yaml of a run.

        Raises:
            ValueError: For anything else.
            FileNotFoundError: If there is no such file.
        """
        # A help doesn't need the records of all files.
        from haq.store.records import ConfigRecord

        if not path.is_file():
            raise FileNotFoundError(f"--config {path}: there is no such file; give the config.yaml of a run")
        try:
            return cls.read(ConfigRecord.read(path).settings)
        except ValueError as error:
            if _schema_of(path).startswith("haq-sweep-"):
                raise ValueError(
                    f"--config {path} is the file of a sweep: give the config.yaml of a search, or haq sweep --config"
                ) from None
            raise ValueError(f"--config {path}: {error}") from error

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> SearchConfig:
        """Make a configuration of what stands in a file.

        Args:
            content: Values by the names of the fields; those that are absent have their defaults, but for those of `BEFORE`.

        Returns:
            The configuration.

        Raises:
            ValueError: For a name that there isn't, for a value of the wrong type, and for what isn't accepted.
        """
        for name, value in content.items():
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ValueError(f"unknown setting {name[:40]!r}: it may be of a newer version of haq; known: {known}")
            kind: Any = cls.model_fields[name].annotation
            if not isinstance(value, kind) or (isinstance(value, bool) and name not in OF_YES_OR_NO):
                raise ValueError(
                    f"setting {name!r} is {str(value)[:40]!r}, a {type(value).__name__}; it must be {_wanted(cls, name)}"
                )
        return cls(**{**BEFORE, **content})

    @classmethod
    def default(cls, name: str) -> Any:
        """Return the default of a field."""
        return cls.model_fields[name].default

    def files(self) -> dict[str, Path]:
        """List the files and folders of the user's own that are named, by field."""
        found = {}
        network = Path(networks.split_name(self.network)[1])
        if networks.split_name(self.network)[0] or network.suffix in networks.CHECKPOINT_ENDINGS:
            found["network"] = network
        if self.data.startswith(("imagefolder:", "images:")):
            found["data"] = Path(self.data.partition(":")[2])
        if self.hw.startswith("lut:") or self.hw.endswith((".yaml", ".yml")):
            found["hw"] = Path(self.hw.removeprefix("lut:"))
        if self.reference_file is not None:
            found["reference"] = self.reference_file
        if self.agent is not None:
            found["agent"] = Path(self.agent)
        return found

    def code(self) -> list[tuple[str, str]]:
        """List the fields that name code of somebody's own, each with the `module:Name` in it."""
        names = {
            "network": [networks.split_name(self.network)[0] or self.network],
            "data": [self.data],
            "hw": [self.hw],
            "solver": [self.solver],
            "objective": [self.objective],
            "scheme": scheme_parts(self.scheme),
            "forward": [self.forward or ""],
            "criterion": [self.criterion or ""],
        }
        return [(field, name) for field, given in names.items() for name in given if _is_code(field, name)]

    def check_code(self, source: Path) -> None:
        """Raise ValueError if a file names code that nobody has named who runs this; nothing is imported.

        Args:
            source: The file, the config.yaml of a run or the sweep.json of a sweep.
        """
        _check_code(source, self.code())

    def trust_words(self, scheme: str | None = None) -> list[str]:
        """Write the options that let a command on a run of this import the code that it names, word by word.

        With a scheme, also those for a network of the run that was fine-tuned with that one.
        """
        code = [name for _, name in self.code()]
        code += [name for name in scheme_parts(scheme or LINEAR) if _is_code("scheme", name)]
        return trust.trust_words(code)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by field; of what most runs do without only what was given."""
        found = super().to_dict()
        for name in ONLY_IF_GIVEN:
            # A drop of 0 is one, though 0 equals False.
            if found[name] is None or found[name] is False:
                del found[name]
        if found["residuals"] == FLOAT:
            del found["residuals"]
        return found

    def budgets(self) -> dict[str, str]:
        """Return the limits as they were given, by metric, that of `metric` first; nothing if there is no budget.

        Raises:
            ValueError: In one sentence, for what is no budget, an unknown metric, and one that is limited twice.
        """
        if self.budget == NONE:
            return {}
        found = read_limits(self.budget, self.metric)
        if self.metric in found:
            found = {self.metric: found[self.metric], **found}
        return found

    def limits(self) -> str | None:
        """Return the budgets as `haq.Problem` takes them; None for none."""
        if self.budget == NONE:
            return None
        return self.budget

    @property
    def is_cheapest(self) -> bool:
        """Tell whether the cheapest policy of some value is looked for, rather than the best within a budget."""
        return is_cheapest(dict(self))

    def least_value(self) -> float | None:
        """Return `at_least` as a number, a share for a value in percent. Raises ValueError if it is none."""
        if self.at_least is None:
            return None
        text = self.at_least.strip()
        number = text.removesuffix("%").strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"--at-least is {files.quoted(self.at_least)}; it must be a value of the objective, such as 91.5% or 0.3"
            )
        if number != text:
            value /= 100
        return value

    def exponents(self) -> str | tuple[float, float] | None:
        """Return `tradeoff`: "soft", "hard", or two exponents. Raises ValueError if it is none of them."""
        if self.tradeoff is None or self.tradeoff in TRADEOFFS:
            return self.tradeoff
        parts = self.tradeoff.split(",")
        try:
            exponents = [float(part) for part in parts]
        except ValueError:
            exponents = []
        if len(exponents) != 2 or not all(-LARGEST_EXPONENT <= one <= 0 for one in exponents) or exponents == [0, 0]:
            raise ValueError(
                f"--tradeoff is {files.quoted(self.tradeoff)}; it must be soft, hard, or two exponents of the cost from "
                f"-{LARGEST_EXPONENT} to 0, within the budget and above it, such as -0.07,-0.07"
            )
        return exponents[0], exponents[1]

    def _check_goal(self) -> None:
        """Raise ValueError, in one sentence, unless budgets and what is looked for go together."""
        budgets = self.budgets()
        if self.metric not in UNITS:
            raise ValueError(f"--metric is {files.quoted(self.metric)}; known: {', '.join(UNITS)}")
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise ValueError(
                f"--max-drop is {self.max_drop:g}; it must be a number from 0: how much worse than float is allowed"
            )
        self.least_value()
        self.exponents()
        if self.max_drop is not None and self.at_least is not None:
            raise ValueError("--max-drop and --at-least say the same in two ways: leave one of them out")
        if self.is_cheapest and self.tradeoff is not None:
            raise ValueError(
                "--tradeoff looks for the most of one number, and --max-drop or --at-least for the cheapest: leave one out"
            )
        if self.is_cheapest:
            return
        if not budgets:
            raise ValueError(f"--budget {NONE} goes with --max-drop or --at-least alone: what else would keep a policy small?")
        if self.metric not in budgets:
            raise ValueError(
                f"--metric is {self.metric}, which no --budget limits ({self.budget}): add --budget {self.metric}=LIMIT, or "
                "leave --metric out"
            )

    def check_bits(self) -> None:
        """Raise ValueError, in one sentence, unless `bits` are sets of widths."""
        if self.bits is None:
            return
        # It needs NumPy, which nobody needs who gives no widths.
        from hw_models.widths import read_widths

        parts = self.bits.split("/")
        try:
            if len(parts) > 2:
                raise ValueError(f"{files.quoted(self.bits)} has more than one '/'")
            for part in parts:
                read_widths(part)
        except ValueError as error:
            raise ValueError(
                f"--bits: {error}; give such as 2:8 or 4,8,16,float, or of weights/activations 4,8/8,16"
            ) from None

    def check_pruning(self) -> None:
        """Check that `prune` are shares of channels and that `criterion` says how to choose them.

        Raises:
            ValueError: In one sentence, if they aren't, or if one is missing.
            ImportError: With what to install, where channels can't be followed through a network.
        """
        if self.prune is None:
            if self.criterion is not None:
                raise ValueError(
                    f"--criterion {files.quoted(self.criterion)} chooses which channels are kept: give --prune besides, such "
                    "as --prune 0.25:1, or leave it out"
                )
            return
        # They need torch, which nobody needs who prunes nothing.
        from haq.problem.shares import read_shares
        from quantizers.pruning import Criterion

        try:
            read_shares(self.prune)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if not _is_code("criterion", self.criterion_name):
            Criterion.named(self.criterion_name, modules=False)
        _check_searches_channels(self.prune, self.solver)

    @property
    def criterion_name(self) -> str:
        """Return the criterion by which channels are kept, where some are pruned."""
        return self.criterion or USUAL_CRITERION

    def check_reference(self) -> None:
        """Raise ValueError, in one sentence, unless `reference` is a pair of widths or a file."""
        if self.reference is None or self.reference_file is not None:
            return
        from hw_models.widths import read_pair

        try:
            read_pair(self.reference)
        except ValueError as error:
            raise ValueError(f"--reference: {error}, or a policy.json") from None

    @property
    def trial_folders(self) -> list[Path]:
        """List the runs and sweeps whose trials are given."""
        if self.trials is None:
            return []
        return [Path(part) for part in self.trials.split(",") if part]

    @property
    def reference_file(self) -> Path | None:
        """Return the policy that budgets are fractions of, where that is a file."""
        if self.reference is None or not self.reference.endswith(".json"):
            return None
        return Path(self.reference)

    def normalization(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Return `mean` and `std` as numbers, None where the network's own are taken; see `read_channels`."""
        return read_channels("mean", self.mean), read_channels("std", self.std)

    def scheme_names(self) -> tuple[str, dict[str, str]]:
        """Read `scheme`, NAME or NAME,LAYER=NAME,...: see `read_scheme`."""
        return read_scheme(self.scheme)

    def options(self, leave_out: Iterable[str] = ()) -> list[str]:
        """Write the options that ask for this, word by word; those that are as they come are left out."""
        words = []
        for name in type(self).model_fields:
            value, default = getattr(self, name), self.default(name)
            if name == "budget" and self.is_cheapest:
                default = NONE
            # Sensitivities that are given bring their kind along.
            is_brought = name == "sensitivity_kind" and self.sensitivity is not None
            if value == default or is_brought or name in leave_out:
                continue
            words.append(option_name(name))
            if value is False:
                words[-1] = f"--no-{words[-1].removeprefix('--')}"
            elif value is not True:
                words.append(str(value))
        return words

    def words(self) -> list[str]:
        """Write the command that asks for this, word by word."""
        return ["python", "-m", "haq.search", *self.options()]

    def command(self) -> str:
        """Write the command that asks for this, quoted for a shell."""
        return command_line(*self.words())


class SweepCell(NamedTuple):
    """One search of a sweep: of the best policy within a budget, or of the cheapest that loses at most so much."""

    hw: str
    budget: str  # "none" where the cheapest is looked for
    solver: str
    seed: int
    max_drop: str = ""

    @property
    def folder(self) -> str:
        """Name the folder of its run."""
        hw = Path(self.hw).stem
        if self.hw.startswith("rpc:"):
            hw = self.hw
        asked = self.budget
        if self.max_drop:
            asked = f"drop{self.max_drop}"
        return f"{hw}-{asked}-{self.solver}-seed{self.seed}".replace(":", "-")


class SweepConfig(_Config):
    """What a sweep is asked to do: the options of `haq sweep`, and `settings` of every run, but for those that vary."""

    hw: tuple[str, ...] = setting(
        ("edge", "cloud"),
        "hardware targets, as `haq search` takes them, parted by commas",
        group=HARDWARE,
        metavar="NAME,NAME",
        default_words="edge,cloud",
        names=lambda: target_names(),
    )
    budgets: tuple[str, ...] = setting(
        ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"),
        "fractions of uniform 8 bits, or budgets parted by commas",
        group=HARDWARE,
        metavar="FIRST:LAST:STEP",
        default_words="0.3:0.9:0.1; none with --max-drops",
    )
    max_drops: tuple[str, ...] = setting(
        (),
        "find the cheapest policies that lose at most so much, as --max-drop of haq search, parted by commas",
        group=HARDWARE,
        metavar="POINTS,POINTS",
        default_words="none",
    )
    solvers: tuple[str, ...] = setting(
        ("ilp", "ddpg"),
        "names as `haq list solvers` shows them, parted by commas",
        group=SOLVING,
        metavar="NAME,NAME",
        default_words="ilp,ddpg",
        names=lambda: SOLVERS.names(),
    )
    seeds: int = setting(1, "searches of each solver that draws: seeds 0, 1, 2 ...", group=SOLVING, metavar="N")
    settings: SearchConfig = Field(default_factory=lambda: SearchConfig(finetune_epochs=0))

    # The fields of a search that a sweep has no options for: those that vary, and fine-tuning.
    VARIED: ClassVar[tuple[str, ...]] = ("hw", "budget", "solver", "seed", "finetune_epochs")
    # Those that all its searches share.
    SHARED: ClassVar[tuple[str, ...]] = (
        "network",
        "data",
        "mean",
        "std",
        "scheme",
        "rounding",
        "correction",
        "residuals",
        "objective",
        "eps",
        "metric",
        "reference",
        "bits",
        "prune",
        "criterion",
        *MEASURED,
        "evaluations",
        "ahead",
        "iterate",
        "sensitivity_kind",
        "trials",
        "agent",
        "device",
        "amp",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_the_usual_budgets(cls, values: Any) -> Any:
        """Leave out the budgets that a sweep has by default, where allowed drops are given."""
        if isinstance(values, Mapping) and "budgets" not in values and values.get("max_drops"):
            return {**values, "budgets": ()}
        return values

    @field_validator("hw", "solvers", "max_drops", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(value.split(","))
        return value

    @field_validator("budgets", mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        if isinstance(value, str):
            return read_budgets(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> SweepConfig:
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds!r}; it must be an integer of at least 1: so many are 0, 1, 2 ...")
        lists = [("hw", self.hw), ("budgets", self.budgets), ("solvers", self.solvers)]
        if self.max_drops:
            lists.append(("max-drops", self.max_drops))
            lists = [one for one in lists if one != ("budgets", ())]
        for option, values in lists:
            if not values or not all(values) or len(set(values)) < len(values):
                raise ValueError(f"--{option} is {','.join(values)!r}; it must be names parted by commas, each of them once")
        for solver in self.solvers:
            check_name(SOLVERS, solver)
            _check_searches_channels(self.settings.prune, solver)
        for drop in self.max_drops:
            check_drop(drop)
        names = [SweepCell(hw, budget, "", 0, drop).folder for hw in self.hw for budget, drop in self.asked]
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"--hw or --budgets have a '/' in {name[:80]!r}: runs are named after them")
        if len(set(names)) < len(names):
            raise ValueError(f"--hw is {','.join(self.hw)!r}; its files must have different names: runs are named after them")
        return self

    @property
    def asked(self) -> list[tuple[str, str]]:
        """List what every solver is asked for on a target: a budget without a drop, or an allowed drop without a budget."""
        return [(budget, "") for budget in self.budgets] + [(NONE, drop) for drop in self.max_drops]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by field; allowed drops only where some were given."""
        found = super().to_dict()
        found["settings"] = self.settings.to_dict()
        if not self.max_drops:
            del found["max_drops"]
        return found

    @classmethod
    def from_options(cls, given: Mapping[str, Any], file: Path | None = None) -> SweepConfig:
        """Make a configuration of the options that were given.

        Args:
            given: Values by field of a sweep or of its searches.
            file: The sweep.json of a sweep, for what wasn't given.

        Returns:
            The configuration.

        Raises:
            ValueError: For what isn't accepted, and for options that don't go together.
            FileNotFoundError: If there is no such file.
        """
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        shared = {name: value for name, value in given.items() if name not in own}
        if file is None:
            return cls(**own, settings=SearchConfig.from_options({**shared, "finetune_epochs": 0}))
        earlier = cls.from_file(file)
        config = earlier.replace(**own, settings=earlier.settings.replace(**shared))
        config.check_code(file)
        return config

    @classmethod
    def from_file(cls, path: Path) -> SweepConfig:
        """Make a configuration of the sweep.json of a sweep.

        Raises:
            ValueError: For anything else.
            FileNotFoundError: If there is no such file.
        """
        # A help doesn't need the records of all files.
        from haq.store.records import SweepRecord

        if not path.is_file():
            raise FileNotFoundError(f"--config {path}: there is no such file; give the sweep.json of a sweep")
        try:
            return cls.read(SweepRecord.read(path).asked.to_dict())
        except ValueError as error:
            if _schema_of(path).startswith("haq-run-"):
                raise ValueError(
                    f"--config {path} is the file of a search: give the sweep.json of a sweep, or haq search --config"
                ) from None
            raise ValueError(f"--config {path}: {error}") from error

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> SweepConfig:
        """Make a configuration of what stands in the file of a sweep (`haq.store.records.AskedRecord`).

        Raises ValueError for what isn't accepted.
        """
        lists = {name: tuple(content[name]) for name in ("hw", "budgets", "solvers")}
        lists["max_drops"] = tuple(content.get("max_drops", ()))
        return cls(settings=SearchConfig.read(content["settings"]), seeds=content["seeds"], **lists)

    def code(self) -> list[tuple[str, str]]:
        """List the fields that name code of somebody's own, each with the `module:Name` in it."""
        own = {"hw": self.hw, "solver": self.solvers}
        named = [(field, name) for field, given in own.items() for name in given if _is_code(field, name)]
        return [*self.settings.code(), *named]

    def check_code(self, source: Path) -> None:
        """Raise ValueError if a file names code that nobody has named who runs this; see `SearchConfig.check_code`."""
        _check_code(source, self.code())

    def trust_words(self) -> list[str]:
        """Write the options that let a command on this sweep import the code that it names, word by word."""
        return trust.trust_words(name for _, name in self.code())

    def words(self) -> list[str]:
        """Write the command that asks for this, word by word; options of the runs that are as they come are left out."""
        words = ["python", "-m", "haq.sweep"]
        lists = (("hw", self.hw), ("budgets", self.budgets), ("max_drops", self.max_drops), ("solvers", self.solvers))
        for name, values in lists:
            if values:
                words += [option_name(name), ",".join(values)]
        if self.seeds != 1:
            words += ["--seeds", str(self.seeds)]
        return words + self.settings.options(leave_out=self.VARIED)

    def command(self) -> str:
        """Write the command that asks for this, quoted for a shell."""
        return command_line(*self.words())


class AnotherDevice(_Config):
    """A device in place of a run's own, for commands that use what a run found."""

    device: str | None = setting(
        None,
        f"where networks are run: {WRITTEN}",
        group=WORK,
        metavar="NAME",
        default_words="the run's own",
        names=lambda: DEVICE_KINDS,
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, name: str | None) -> str | None:
        if name is not None:
            check_device_name(name)
        return name


class AnotherScheme(AnotherDevice):
    """A scheme in place of a run's own, for commands that use what a run found; and a device."""

    scheme: str | None = setting(
        None,
        "quantize the run's policy with another scheme: NAME or NAME,LAYER=NAME, as of haq search",
        group=SEARCHED,
        metavar="NAME",
        default_words="the run's own",
        names=lambda: known_schemes(),
    )

    @field_validator("scheme")
    @classmethod
    def _check_scheme(cls, text: str | None) -> str | None:
        if text is not None:
            read_scheme(text)
        return text


class FinetuneConfig(AnotherScheme):
    """How what a run found is fine-tuned: the options of `haq finetune`."""

    method: str = setting(
        "train",
        "train, or ptq: biases are corrected and roundings learned from a few images, without labels, in minutes",
        group=TUNING,
        metavar="NAME",
        names=lambda: METHODS,
    )
    epochs: int = setting(20, "passes over the train images", group=TUNING)
    learning_rate: float | None = setting(
        None,
        "at its highest",
        group=TUNING,
        metavar="RATE",
        default_words=f"{RATE_WORDS}; with another optimizer than sgd {SHARE_OF_USUAL} of torch's",
    )
    seed: int = setting(0, "of the order of images", group=TUNING)
    amp: bool = setting(False, "train in mixed precision, float16 or bfloat16 where that does no harm", group=TUNING)
    optimizer: str = optimizer_setting(TUNING)
    schedule: str = schedule_setting(TUNING)
    patience: int | None = setting(
        None,
        "epochs in a row without a lower loss on held-out samples after which training ends",
        group=TUNING,
        metavar="N",
        least=1,
        default_words="none end it",
    )
    loss: str | None = setting(
        None,
        "module:function of (outputs, targets) that is minimised",
        group=TUNING,
        metavar="NAME",
        default_words="the distance from the float network's outputs",
        names=lambda: (),  # it is code, that whoever types it may have imported
    )

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        check_optimizer(name)
        return name

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, text: str) -> str:
        check_schedule(text)
        return text

    @field_validator("method")
    @classmethod
    def _check_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r} of fine-tuning; it can be {', '.join(METHODS)}")
        return name

    @model_validator(mode="after")
    def _check_numbers(self) -> FinetuneConfig:
        of_training = [name for name in OF_TRAINING if name in self.model_fields_set]
        if self.method != "train" and of_training:
            raise ValueError(f"{option_name(of_training[0])} is of training: leave it out, or choose --method train")
        if self.epochs < 1:
            raise ValueError(f"--epochs is {self.epochs}; it must be at least 1")
        check_rate(self.learning_rate)
        return self


class PretrainConfig(_Config):
    """How an agent is trained: the options of `haq pretrain`."""

    solver: str = setting(
        AGENTS[0], f"the agent: {', '.join(AGENTS)}", group=AGENT_TRAINING, metavar="NAME", names=lambda: AGENTS
    )
    episodes: int = setting(30_000, "episodes that are played, 64 at a time", group=AGENT_TRAINING, least=1, metavar="N")
    seed: int = setting(0, "of everything random", group=AGENT_TRAINING, least=0)

    @field_validator("solver")
    @classmethod
    def _check_solver(cls, name: str) -> str:
        if name not in AGENTS:
            raise ValueError(f"unknown agent {name[:40]!r}; --solver can be {', '.join(AGENTS)}")
        return name

    @model_validator(mode="after")
    def _check_seed(self) -> PretrainConfig:
        if self.seed >= 2**32:
            raise ValueError(
                f"--seed is {self.seed}; it must be an integer from 0 to {2**32 - 1}, which every generator takes"
            )
        return self


class BenchConfig(_Config):
    """Which solvers are measured, on which tables; what `haq bench` is asked."""

    # Both may be given several times, which the command sees to.
    solver: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    seeds: int = setting(10, "searches of each solver that draws: seeds 0, 1, 2 ...", group=BENCH, metavar="N")
    evaluations: tuple[int, ...] = setting(
        (25, 50, 100, 200, 400),
        "after how many evaluations the regret is told, parted by commas",
        group=BENCH,
        metavar="N,N",
        default_words="25,50,100,200,400",
    )

    @field_validator("solver", "tables", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = (value,)
        if isinstance(value, tuple | list) and all(isinstance(part, str) for part in value):
            return tuple(part.strip() for part in ",".join(value).split(",") if part.strip())
        return value

    @field_validator("evaluations", mode="before")
    @classmethod
    def _read_counts(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
            raise ValueError(
                f"--evaluations is {value[:80]!r}; it must be integers of at least 1 parted by commas: 50,100,200"
            )
        return tuple(sorted({int(part) for part in parts}))

    @model_validator(mode="after")
    def _check_all(self) -> BenchConfig:
        if not self.solver:
            raise ValueError(f"--solver is missing: give at least one of {', '.join(SOLVERS.names())}, or module:Name")
        for name in self.solver:
            check_name(SOLVERS, name)
        for option, values in (("solver", self.solver), ("tables", self.tables)):
            if len(set(values)) < len(values):
                raise ValueError(f"--{option} is {','.join(values)!r}; each of them can be given once")
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(
                f"--seeds is {self.seeds!r}; it must be an integer from 1 to {MOST_SEEDS}: so many are 0, 1, 2 ..."
            )
        return self


class WorkersConfig(_Config):
    """Who works: results don't depend on it, so that no file of a run says it."""

    workers: int | None = setting(
        None,
        "processes that evaluate policies; results don't depend on their number",
        group=WORK,
        metavar="N",
        default_words="this one alone",
    )
    ray: str | None = setting(
        None,
        "work on a Ray cluster, on every processor or on as many as there are --workers: auto on one of its machines, "
        "HOST:PORT, or local",
        group=WORK,
        metavar="ADDRESS",
    )

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: int | None) -> int | None:
        if workers is not None and workers < 1:
            raise ValueError(f"--workers is {workers}; it must be at least 1")
        return workers

    def describe(self) -> str:
        """Say who works, in words."""
        if self.ray is not None:
            return f"by {self.workers or 'all'} processors of the Ray cluster {self.ray}"
        if self.workers is None:
            return "in this process"
        return f"in {self.workers} processes"

    def exceed(self, ahead: int) -> bool:
        """Say whether there are, or may be, more workers than policies that a solver chooses ahead."""
        if self.workers is None:
            return self.ray is not None
        return self.workers > ahead


def check_name(registry: Registry[Any], name: str) -> str:
    """Return a name itself. Raises ValueError for one that isn't in a registry, with the close ones; imports nothing."""
    if name not in registry and ":" not in name:
        registry.get(name)
    return name


def check_rate(rate: float | None) -> None:
    """Raise ValueError unless a learning rate is one that training can do something with, or None."""
    if rate is not None and not 0 < rate < 10:
        raise ValueError(f"--learning-rate is {rate}; it must be above 0 and below 10")


def read_channels(name: str, text: str | None) -> tuple[float, ...] | None:
    """Read numbers of channels, parted by commas.

    Args:
        name: The field, mean or std.
        text: Its value.

    Returns:
        The numbers; None for None.

    Raises:
        ValueError: For anything else, and for a deviation that isn't above 0.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    fits = all(abs(number) < 1e6 for number in numbers)
    wanted = "numbers parted by commas, such as 0.485,0.456,0.406"
    if name == "std":
        fits = fits and min(numbers) >= 1e-6
        wanted = "numbers above 0 parted by commas, such as 0.229,0.224,0.225"
    if not fits:
        raise ValueError(f"{option_name(name)} is {files.quoted(text)}; it must be {wanted}")
    return numbers


def read_scheme(text: str) -> tuple[str, dict[str, str]]:
    """Read the scheme of all layers and those of single ones.

    Args:
        text: NAME or NAME,LAYER=NAME,LAYER=NAME, such as "lsq,stem=linear"; LAYER=NAME alone leaves all others linear.

    Returns:
        The name for all layers, and names by layer. Whether there are such schemes and layers is for `Problem` to say.

    Raises:
        ValueError: For anything else.
    """
    of_all = LINEAR
    layers: dict[str, str] = {}
    for place, part in enumerate(text.split(",")):
        layer, equals, name = (word.strip() for word in part.partition("="))
        if place == 0 and layer and not equals:
            of_all = layer
            continue
        if not layer or not name or layer in layers:
            raise ValueError(f"--scheme is {text!r}; it must be NAME or NAME,LAYER=NAME, with each layer once, not {part!r}")
        layers[layer] = name
    return of_all, layers


def is_cheapest(values: Mapping[str, Any]) -> bool:
    """Tell by the fields of a search whether it looks for the cheapest policy of some value."""
    return values.get("max_drop") is not None or values.get("at_least") is not None


def check_drop(text: str) -> None:
    """Raise ValueError unless a text is a number from 0, how much worse than float a policy may be."""
    try:
        drop = float(text)
    except ValueError:
        drop = math.nan
    if not 0 <= drop < math.inf:
        raise ValueError(
            f"--max-drops has {files.quoted(text)}; it must be numbers from 0 parted by commas: points of an objective in "
            "percent, its unit otherwise"
        )


def read_limits(text: str, metric: str) -> dict[str, str]:
    """Read budgets of several metrics.

    Args:
        text: METRIC=LIMIT or LIMIT, parted by commas, such as "latency=0.5,storage=40kB".
        metric: What a LIMIT without a metric is of.

    Returns:
        Limits by metric, in their order. Whether they are amounts, and within reach, is for `Problem` to say.

    Raises:
        ValueError: For anything else, for an unknown metric, and for one that is there twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, limit = (word.strip() for word in part.partition("="))
        if not equals:
            name, limit = metric, name
        if not limit:
            raise ValueError(f"--budget is {files.quoted(text)}; it must be a limit such as 0.5 or 40kB, or METRIC=LIMIT")
        if equals and name not in UNITS:
            raise ValueError(
                f"--budget {files.quoted(part)} is of an unknown metric {files.quoted(name)}; known: {', '.join(UNITS)}"
            )
        if name in found:
            raise ValueError(f"--budget limits {name} twice, to {found[name]} and to {limit}: leave one of them out")
        found[name] = limit
    return found


def _with_metric(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the metric from the first budget, where all that are given name theirs and no metric is given."""
    budget = given.get("budget")
    if "metric" in given or not isinstance(budget, str) or not all("=" in part for part in budget.split(",")):
        return given
    return {**given, "metric": next(iter(read_limits(budget, "")))}


def read_budgets(text: str) -> tuple[str, ...]:
    """Read FIRST:LAST:STEP, fractions of uniform 8 bits, or budgets parted by commas; ValueError for anything else.

    >>> read_budgets("0.3:0.5:0.1")
    ('0.3', '0.4', '0.5')
    """
    if ":" not in text:
        return tuple(text.split(","))
    try:
        first, last, step = (Decimal(part) for part in text.split(":"))
        if not (0 < first <= last <= 1 and step > 0 and (last - first) / step < MOST_BUDGETS):
            raise ValueError
    except (ValueError, InvalidOperation):
        raise ValueError(
            f"--budgets is {text!r}; it must be FIRST:LAST:STEP, fractions of uniform 8 bits such as 0.3:0.9:0.1, at most "
            f"{MOST_BUDGETS} of them, or budgets parted by commas such as 0.5,0.7"
        ) from None
    return tuple(str(first + step * index) for index in range(int((last - first) / step) + 1))


def _schema_of(path: Path) -> str:
    """Return what a file, of a run or a sweep, says its schema is; empty text for none."""
    read = files.read_yaml
    if path.suffix == ".json":
        read = files.read_json
    try:
        return str(read(path).get("schema"))
    except (ValueError, OSError):
        return ""


def scheme_parts(text: str) -> list[str]:
    """List the schemes that a value of --scheme names: of all layers, and of single ones."""
    of_all, layers = read_scheme(text)
    return [of_all, *layers.values()]


def _check_searches_channels(prune: str | None, solver: str) -> None:
    """Raise ValueError for a solver of ours that can't choose channels, where some are to be pruned."""
    if prune is None or _is_code("solver", solver):
        return
    from haq.solvers.base import check_searches_channels

    check_searches_channels(solver)


def _is_code(field: str, name: str) -> bool:
    """Say whether the value of a field would be imported as `module:Name`; nothing is imported of what it names."""
    if ":" not in name:
        return False
    if field == "hw":
        import hw_models

        return hw_models.TARGETS.is_code(name)
    if field in ("scheme", "forward", "criterion"):
        return True
    registries: dict[str, Registry[Any]] = {
        "network": networks.NETWORKS,
        "data": data.DATASETS,
        "solver": SOLVERS,
        "objective": OBJECTIVES,
    }
    return registries[field].is_code(name)


def _check_code(source: Path, code: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError for the first `module:Name` of some fields that nobody has named who runs this."""
    wanted = {name: field for field, name in code if not _is_imported(field, name)}
    for name, field in wanted.items():
        remedy = ""
        others = trust.trust_options(one for one in wanted if one != name and trust.may_be_trusted(one))
        if others:
            remedy = f", and {' '.join(others[: 2 * MOST_NAMED])}, which it names too"
        trust.check(name, f"{source} names {field}", remedy)


def _is_imported(field: str, name: str) -> bool:
    """Say whether a scheme or a criterion is imported already, as it is only once somebody has named it who runs this."""
    if field == "scheme":
        return is_known_scheme(name)
    if field == "criterion":
        from quantizers.pruning import Criterion

        return name in Criterion.known
    return False


def is_known_scheme(name: str) -> bool:
    """Say whether a scheme is imported already, as it is only once somebody has named it who runs this."""
    import quantizers as Q

    return name in Q.Scheme.known


def _check_attacked(objective: str, eps: str) -> None:
    """Raise ValueError if the size of an attack is given and nothing is attacked."""
    # What is given as module:Name is asked when it is imported, which a file can't make us do.
    if objective in OBJECTIVES and not OBJECTIVES.get(objective, modules=False).attacked:
        raise ValueError(f"--eps {eps} is of an attack: it goes with --objective {objective}+robust, not {objective}")


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong with the values of a model."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name[:40]!r}; known: {', '.join(model.model_fields)}"
    wanted = _wanted(model, name)
    if len(first["loc"]) > 1:
        wanted = "names"
    return f"{option_name(name)} is {first['input']!r}; it must be {wanted}"


def _wanted(model: type[BaseModel], name: str) -> str:
    """What a field accepts, in words."""
    field = model.model_fields[name]
    if field.annotation in (bool, bool | None):
        return "true or false"
    if field.annotation in (float, float | None):
        return "a number"
    if field.annotation not in (int, int | None):
        return "text"
    least = next((one.ge for one in field.metadata if hasattr(one, "ge")), None)
    if least is None:
        return "an integer"
    return f"an integer of at least {least}"


def target_names() -> Iterable[str]:
    """List hardware targets, for a shell to complete."""
    # Hardware models compute with NumPy, which nobody needs who doesn't ask for a target.
    import hw_models

    return (*hw_models.target_names(), *hw_models.MEASURED)


def known_criteria() -> Iterable[str]:
    """List criteria by which channels are kept, for a shell to complete."""
    from quantizers.pruning import criterion_names

    return criterion_names()


def known_schemes() -> Iterable[str]:
    """List schemes, for a shell to complete."""
    import quantizers as Q

    return Q.scheme_names()
