"""Plan: what a cohort is sent, and the settings of a client's visit that are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtower.core.errors import RecipeError
from fedtower.core.publication import Publication

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class LocalSettings:
    """What a client does in one visit."""

    steps: int | None = field(default=None, metadata={"help": "training steps a visit; or give epochs"})
    epochs: int | None = field(
        default=None, metadata={"help": "passes over the client's examples a visit; or give steps"}
    )
    share: float = field(
        default=1.0,
        metadata={"help": "of labelled examples, with epochs: the share of them that a visit passes over, in turns"},
    )
    batch_size: int = field(default=32, metadata={"help": "examples a step"})
    optimizer: Literal["sgd", "momentum", "adam", "adagrad"] = field(
        default="sgd", metadata={"help": "the device's optimiser of the towers; rows are stepped by plain descent"}
    )
    momentum: float = field(default=0.9, metadata={"help": "momentum: the share of the last step that is kept"})
    beta1: float = field(default=0.9, metadata={"help": "adam: decay of the first moment"})
    beta2: float = field(default=0.999, metadata={"help": "adam: decay of the second moment"})
    eps: float = field(default=1e-8, metadata={"help": "adam, adagrad: added to the root"})
    proximal: float = field(default=0.0, metadata={"help": "FedProx's mu: the pull back to where the visit started"})
    control: Literal["none", "scaffold", "feddyn"] = field(
        default="none",
        metadata={
            "help": "what takes drift out of a client's steps: scaffold, control variates (sgd alone); feddyn, with "
            "proximal as its alpha"
        },
    )
    frozen: tuple[str, ...] = field(default=(), metadata={"help": "parameters of the tower that are not trained"})
    on_device: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "FedPer: towers, or parameters of them, that each client keeps to itself, besides the model's own"
        },
    )
    head_first: int = field(
        default=0,
        metadata={
            "help": "FedRep: so many of a visit's epochs (or steps) come first and train what is on the device alone; "
            "those after them train the rest alone, and so does the step of a client with a single batch: its head "
            "stays as it was. 0: all train both"
        },
    )
    ditto: float | None = field(
        default=None,
        metadata={
            "help": "Ditto's lambda: each client also trains copies of its own, pulled back by it; none: no copies"
        },
    )
    lr: float = field(default=1.0, metadata={"help": "learning rate of the towers on the device"})
    row_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the fetched rows on the device; none: lr"}
    )
    loss: Literal["sampled_softmax", "bce", "in_batch_softmax", "cross_entropy"] = field(
        default="sampled_softmax",
        metadata={
            "help": "of histories: sampled_softmax, bce, in_batch_softmax (standalone); of labels: bce, cross_entropy"
        },
    )
    negatives: int = field(default=200, metadata={"help": "items drawn uniformly a step that the user did not choose"})
    negatives_from: Literal["untouched", "untrained"] = field(
        default="untouched",
        metadata={
            "help": "untouched: no negative is an item that is held out for the client; untrained: one may be, as on a "
            "device, which does not know its future"
        },
    )
    history_length: int = field(default=100, metadata={"help": "at most this many events before a target"})

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("[local] needs either steps or epochs, and not both; steps = 1 is one batch a visit")
        for name in ("steps", "epochs", "batch_size", "history_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"local.{name} must be at least 1, not {value}")
        if not 0.0 < self.share <= 1.0:
            raise RecipeError(f"local.share must be above 0 and at most 1, not {self.share}")
        if self.share < 1.0 and self.epochs is None:
            raise RecipeError("local.share is the share of an epoch: it needs local.epochs, and not local.steps")
        if self.proximal < 0:
            raise RecipeError(f"local.proximal must be at least 0, not {self.proximal}: it pulls back")
        if self.control == "feddyn" and not self.proximal:
            raise RecipeError(
                "local.control = 'feddyn' pulls back to where the visit started, by its alpha: set local.proximal"
            )
        if self.control == "scaffold" and (self.optimizer != "sgd" or self.proximal or not self.lr > 0):
            raise RecipeError(
                f"local.control = 'scaffold' tells a mean gradient from how far plain descent went, and cannot with "
                f"local.optimizer = {self.optimizer!r}, local.proximal = {self.proximal} and local.lr = {self.lr}; set "
                f"local.optimizer = 'sgd', local.proximal = 0 and a positive rate, or leave local.control out"
            )
        self._check_personal()
        if self.negatives < 1 and self.loss != "in_batch_softmax":
            raise RecipeError(
                f"local.negatives must be at least 1 for the loss {self.loss!r}: positives alone teach nothing"
            )
        if self.negatives_from != "untouched" and self.loss == "in_batch_softmax":
            raise RecipeError(
                f"local.negatives_from = {self.negatives_from!r} says which items are drawn, and local.loss = "
                f"'in_batch_softmax' draws none: its negatives are the batch's other items; leave it out"
            )

    def _check_personal(self) -> None:
        whole, unit = (self.epochs, "epochs") if self.epochs else (self.steps, "steps")
        if not 0 <= self.head_first < (whole or 1):
            raise RecipeError(
                f"local.head_first must be at least 0 and less than local.{unit} = {whole}, not {self.head_first}: "
                f"others learn from what comes after the head"
            )
        if self.head_first and self.control != "none":
            raise RecipeError(
                f"local.head_first trains the shared part in some of a visit's steps, and local.control = "
                f"{self.control!r} reckons with all of them; leave one of them out"
            )
        if self.ditto is None:
            return
        if not self.ditto >= 0:
            raise RecipeError(f"local.ditto must be at least 0, not {self.ditto}: it pulls back")
        for name, given in (
            ("on_device", bool(self.on_device)),
            ("head_first", bool(self.head_first)),
            ("control", self.control != "none"),
        ):
            if given:
                raise RecipeError(
                    f"local.ditto trains a whole model of each client's own, beside a shared one of plain descent, and "
                    f"cannot with local.{name}; leave one of them out"
                )

    @property
    def rows_lr(self) -> float:
        """The learning rate of the rows on the device."""
        return self.lr if self.row_lr is None else self.row_lr


@dataclass(frozen=True)
class PublicSettings:
    """Public data of the cloud's own: whose it is, and how much the cloud trains on it."""

    share: float = field(
        default=0.0,
        metadata={"help": "the share of the users (or silos) set apart, by the seed, as public data: no clients"},
    )
    steps: int = field(
        default=1, metadata={"help": "with rows.train = public: steps a round, each a batch as [standalone] makes them"}
    )
    warmup: int = field(default=0, metadata={"help": "such steps before the first round, whoever trains the rows then"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise RecipeError(f"rows.public.share must be at least 0 and below 1, not {self.share}: some stay clients")
        for name, least in (("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"rows.public.{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class RowSettings:
    """The cloud's part: who trains it, and how."""

    train: Literal["device_updates", "frozen", "public"] = field(
        default="device_updates",
        metadata={
            "help": "what trains the cloud's tables and towers; frozen: nothing does; public: data of the cloud's own"
        },
    )
    public: PublicSettings = field(default_factory=PublicSettings, metadata={"help": "data of the cloud's own"})
    average: Literal["cohort", "touched"] = field(
        default="cohort",
        metadata={"help": "divide a row's summed deltas by the whole cohort's weight, or by that of its touchers"},
    )
    optimizer: Literal["rowwise_adagrad", "sgd"] = field(
        default="rowwise_adagrad", metadata={"help": "the tables' optimiser"}
    )
    lr: float = field(default=0.1, metadata={"help": "the tables' learning rate"})
    eps: float = field(default=1e-8, metadata={"help": "rowwise Adagrad's epsilon"})
    tower_lr: float = field(default=0.005, metadata={"help": "learning rate (Adam) of the cloud's towers"})
    sharding: Literal["row_wise", "table_wise"] = field(
        default="row_wise",
        metadata={"help": "what each process of a torchrun holds: some rows of every table, or some tables whole"},
    )

    def __post_init__(self) -> None:
        if not self.public.share and (self.train == "public" or self.public.warmup):
            asked = 'rows.train = "public"' if self.train == "public" else "rows.public.warmup"
            raise RecipeError(
                f"{asked} needs public data: say with rows.public.share, such as 0.1, how many of the users are set "
                f"apart for it"
            )


@dataclass(frozen=True)
class StandaloneSettings:
    """How the same model is trained centrally."""

    epochs: int = field(default=25, metadata={"help": "passes over all users"})
    users_per_batch: int = field(default=64, metadata={"help": "users a step, each with local.batch_size targets"})
    batch_size: int = field(default=2048, metadata={"help": "labelled examples a step"})
    lr: float = field(default=0.002, metadata={"help": "learning rate (Adam) of the towers"})
    row_lr: float = field(default=0.1, metadata={"help": "learning rate of the tables (optimiser: rows.optimizer)"})
    decay: Literal["none", "linear"] = field(
        default="linear", metadata={"help": "how the learning rates fall over the epochs"}
    )
    decay_to: float = field(default=0.1, metadata={"help": "the share of the learning rates that is left at the end"})


@dataclass(frozen=True)
class Plan:
    """What a cohort is sent: the round, the shared parameters, and what to do with them. With a ``publication`` the
    parameters are what devices make of its messages, and not quite the server's own.
    """

    round: int
    parameters: Mapping[str, FloatArray]
    local: LocalSettings
    train_rows: bool = True
    publication: Publication | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the shared parameters as they are."""
        return sum(value.nbytes for value in self.parameters.values())

    def bytes_down(self, held: IntArray) -> IntArray:
        """Bytes of the shared parameters as they are sent to clients which had the publications of rounds ``held`` (C,)
        last: (C,).
        """
        if self.publication is None:
            return np.full(len(held), self.nbytes, dtype=np.int64)
        return self.publication.bytes_for(held, self.nbytes)
