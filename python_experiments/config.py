"""What one training run is made of: a frozen description that names, hashes and prints itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

Rates = Literal["relative", "paper"]
Device = Literal["cpu", "cuda"]
Parameterization = Literal["ntk", "standard"]

#: Image sets of ten classes: `--data` can put any of them in the place of the paper's.
ImageSet = Literal["cifar10", "svhn", "fashion-mnist", "usps", "digits"]
IMAGE_SETS: tuple[str, ...] = get_args(ImageSet)


@dataclass(frozen=True)
class Network:
    """A network of the paper, without biases in the NTK parameterization and without BatchNorm.

    Attributes:
        kind: which of `catapult_ext.models`.
        width: hidden units ("fcn"), channels of each convolution ("cnn", "myrtle"), widening factor ("wrn") or
            features of a token ("vit").
        depth: weight layers, the linear output layer included; of "wrn" its depth, of "vit" its blocks.
        fixed_layers: layers that are not trained.
        parameterization: the NTK's, or PyTorch's default.

    Raises:
        ValueError: a Myrtle network of another depth than 5.
    """

    kind: Literal["fcn", "cnn", "wrn", "vit", "myrtle"]
    width: int
    depth: int
    fixed_layers: tuple[int, ...] = ()
    parameterization: Parameterization = "ntk"

    def __post_init__(self) -> None:
        if self.kind == "myrtle" and self.depth != 5:
            raise ValueError(f"network.depth: expected 5 for a Myrtle network, got {self.depth}")

    def __str__(self) -> str:
        name = {
            "fcn": f"{self.depth}-layer FCN, {self.width} units",
            "cnn": f"{self.depth}-layer CNN, {self.width} channels",
            "wrn": f"Wide ResNet {self.depth}-{self.width}",
            "vit": f"ViT-{self.depth}, {self.width} features",
            "myrtle": f"{self.depth}-layer Myrtle network, {self.width} channels",
        }[self.kind]
        fixed = ", second layer fixed" if self.fixed_layers == (1,) else ""
        return name + fixed + (", PyTorch parameterization" if self.parameterization == "standard" else "")


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        name: one of `IMAGE_SETS` or a synthetic task ("rank-2", "unit-sphere").
        train: training samples.
        validation: validation samples.
        test: test samples.
        classes: of an image task: two are labelled -1 and +1, more have one output each; none stand for all ten.
    """

    name: str
    train: int
    validation: int = 0
    test: int = 0
    classes: tuple[int, ...] = ()

    def __str__(self) -> str:
        classes = f" (classes {', '.join(map(str, self.classes))})" if self.classes else ""
        held_out = f", {self.validation} validation, {self.test} test" if self.validation else ""
        return f"{self.train} points of {self.name}{classes}{held_out}"


@dataclass(frozen=True)
class Rate:
    """A learning rate in the two forms that `--rates` chooses from.

    Attributes:
        relative: multiple of a critical rate measured at initialisation (`RunConfig.reference` says which).
        paper: the absolute rate that the paper prints; None where it prints none.
    """

    relative: float
    paper: float | None = None

    def scaled(self, factor: float) -> Rate:
        """The rate times `factor`, in both forms: the controls lie on another side of the critical rate."""
        return Rate(self.relative * factor, None if self.paper is None else self.paper * factor)


@dataclass(frozen=True)
class Catapults:
    """A rate that follows the run: below the critical rate, raised for each of some catapults, then below again.

    Attributes:
        count: catapults to make.
        c: multiple of the current critical rate to which the rate is raised for each.
        start_steps: steps before the first rise.
        decay: multiple of the critical rate that the rate keeps after the last, so that no further one comes.
        ceiling: see `catapult_ext.CatapultSchedule`.
    """

    count: int
    c: float = 1.5
    start_steps: int = 30
    decay: float = 0.5
    ceiling: float = 1e5


@dataclass(frozen=True)
class Cycle:
    """A rate that rises from `low` times the run's rate to it and falls again, in straight lines.

    Attributes:
        low: the rate at which each period begins, as a share of the run's rate.
        period: steps up and down.
    """

    low: float
    period: int


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides one training run, except its seed.

    Attributes:
        network: the network.
        task: the training task.
        rate: the learning rate at first, and for good without `raises` or `catapults`.
        raises: (step, rate) of each rise; a relative rate is a multiple of the critical rate of the whole training
            set at that step.
        catapults: raise the rate for so many catapults; None: do not.
        cycle: let the rate rise and fall again and again, `rate` being its largest value; None: do not.
        batch_size: samples per step; None is gradient descent on the whole training set.
        max_steps: the run ends here at the latest.
        stop_loss: the run ends when the loss of the whole training set falls below it; None: never.
        eigenpairs: s of the loss split L = L_<=s + L_>s.
        splits: further, smaller s, ascending, for which the loss is split as well.
        kernel_every: steps between two records of the kernel.
        validate_every: steps between two losses on the validation set; 0: never.
        probe: while training on batches, record the kernel of the whole training set and the parts of its loss.
        hessian: record the largest eigenvalue of the Hessian of each batch's loss.
        keep_agop: rows and columns of the AGOP to keep at the start and at the end.
        full_loss: while training on batches, record at each step the loss of the whole training set, and that of
            the last batch after its step.
        evaluate: compute test loss and AGOP alignment at the step of the best validation loss.
        reference: whose critical rate `rate.relative` multiplies, at initialisation: that of the whole
            training set ("train") or of its first sample alone ("first sample").
        rates: which form of `rate` is used.
        device: kind of device that it is trained on; another kind rounds in another way.

    Raises:
        ValueError: a rate is to change in a way that no schedule follows.
    """

    network: Network
    task: Task
    rate: Rate
    batch_size: int | None = None
    raises: tuple[tuple[int, Rate], ...] = ()
    catapults: Catapults | None = None
    cycle: Cycle | None = None
    max_steps: int = 60
    stop_loss: float | None = None
    eigenpairs: int = 1
    splits: tuple[int, ...] = ()
    kernel_every: int = 1
    validate_every: int = 0
    probe: bool = False
    hessian: bool = False
    keep_agop: int = 0
    full_loss: bool = False
    evaluate: bool = False
    reference: Literal["train", "first sample"] = "train"
    rates: Rates = "relative"
    device: Device = "cpu"

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.raises]
        if not all(a < b for a, b in itertools.pairwise([0, *steps])):
            raise ValueError(f"raises: expected steps >= 1, each after the one before, got {steps}")
        changes = [name for name in ("raises", "catapults", "cycle") if getattr(self, name)]
        if len(changes) > 1:
            raise ValueError(f"{changes[1]}: expected none in a run with {changes[0]}")
        if self.reference != "train" and changes:
            raise ValueError(f"reference: expected train for a rate that changes, got {self.reference}")

    @property
    def rates_by_step(self) -> dict[int, Rate]:
        """The rate at first and after each of `raises`, by the step of whose update on it holds."""
        return {0: self.rate, **dict(self.raises)}

    @property
    def printed(self) -> bool:
        """Whether the paper prints every rate of it."""
        changes = self.catapults is not None or self.cycle is not None
        return not changes and all(r.paper is not None for r in self.rates_by_step.values())

    @property
    def algorithm(self) -> str:
        """GD, or SGD with its batch size."""
        return "GD" if self.batch_size is None else f"SGD, batch {self.batch_size}"

    @property
    def rate_text(self) -> str:
        """The learning rate in words."""
        if self.rates == "paper":
            raised = "".join(f", {rate.paper:g} from step {step} on" for step, rate in self.raises)
            return f"{self.rate.paper:g}{raised} (as printed)"
        whose = "the whole set" if self.reference == "train" else "the doubled point"
        raised = "".join(f", {rate.relative:.3g} x that at step {step}" for step, rate in self.raises)
        if self.catapults is not None:
            raised += f", raised for {self.catapults.count} catapults"
        if self.cycle is not None:
            raised += f", from {self.cycle.low:.3g} of it up and down in {self.cycle.period} steps"
        return f"{self.rate.relative:.3g} x the critical rate of {whose} at initialisation{raised}"

    def at(self, factor: float) -> RunConfig:
        """The same run at `factor` times its rate, at first and after each rise."""
        raises = tuple((step, rate.scaled(factor)) for step, rate in self.raises)
        return replace(self, rate=self.rate.scaled(factor), raises=raises)


@dataclass(frozen=True)
class Preset:
    """A size at which an experiment is run.

    Attributes:
        config: the run that the figure shows.
        seeds: one repetition each; a seed draws weights, data and batch order.
        note: what is smaller than in the paper and why.
    """

    config: RunConfig
    seeds: tuple[int, ...]
    note: str
