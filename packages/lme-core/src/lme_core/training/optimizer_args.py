"""The run file's `optimizer_args`: one class an optimizer, and their union."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Discriminator, Field, Tag

from lme_core.layers.unions import tag_of
from lme_core.training.optimizer_class_args import (
    AdadeltaClassArgs,
    AdagradClassArgs,
    AdamaxClassArgs,
    AdamClassArgs,
    AdamWClassArgs,
    ASGDClassArgs,
    NAdamClassArgs,
    RAdamClassArgs,
    RMSpropClassArgs,
    RpropClassArgs,
    SGDClassArgs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOptimizerArgs:
    """What every kind of `optimizer_args` has besides its class and arguments."""

    # Twice, as the schema of a subclass reads only annotations of the fields it inherits.
    params_group_method: Annotated[
        Literal["mup"] | None,
        Field(description="mup: matrices marked by the model learn at `lr` divided by `m_width`."),
    ] = None
    """mup: matrices marked by the model learn at `lr` divided by `m_width`."""
    use_optimizer_with_backward_hook: Annotated[
        bool, Field(description="Only false is accepted.")
    ] = False
    """Only false is accepted."""

    def __post_init__(self) -> None:
        if self.use_optimizer_with_backward_hook:
            raise ValueError(
                "`optimizer_args.use_optimizer_with_backward_hook` must be false: an update inside "
                "the backward pass can neither clip the global gradient norm nor accumulate, and "
                "its state cannot be saved; use ZeRO stages to save memory instead"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAdadeltaArgs(BaseOptimizerArgs):
    """Adadelta (Zeiler 2012, arXiv:1212.5701)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adadelta
    class_name: Literal["TorchAdadelta"] = "TorchAdadelta"
    """The optimizer."""
    class_args: AdadeltaClassArgs = field(default_factory=AdadeltaClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAdagradArgs(BaseOptimizerArgs):
    """Adagrad (Duchi, Hazan and Singer 2011)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adagrad
    class_name: Literal["TorchAdagrad"] = "TorchAdagrad"
    """The optimizer."""
    class_args: AdagradClassArgs = field(default_factory=AdagradClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAdamArgs(BaseOptimizerArgs):
    """Adam (Kingma and Ba 2014, arXiv:1412.6980)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    class_name: Literal["TorchAdam"] = "TorchAdam"
    """The optimizer."""
    class_args: AdamClassArgs = field(default_factory=AdamClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAdamaxArgs(BaseOptimizerArgs):
    """Adamax (Kingma and Ba 2014, section 7.1)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adamax
    class_name: Literal["TorchAdamax"] = "TorchAdamax"
    """The optimizer."""
    class_args: AdamaxClassArgs = field(default_factory=AdamaxClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAdamWArgs(BaseOptimizerArgs):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101): the default."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW
    class_name: Literal["TorchAdamW"] = "TorchAdamW"
    """The optimizer."""
    class_args: AdamWClassArgs = field(default_factory=AdamWClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchASGDArgs(BaseOptimizerArgs):
    """Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.ASGD
    class_name: Literal["TorchASGD"] = "TorchASGD"
    """The optimizer."""
    class_args: ASGDClassArgs = field(default_factory=ASGDClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchLBFGSArgs(BaseOptimizerArgs):
    """L-BFGS, known by name in order to be refused with the reason."""

    class_name: Literal["TorchLBFGS"] = "TorchLBFGS"
    """The optimizer."""
    class_args: dict[str, Any] = field(default_factory=dict)
    """Never read."""

    def __post_init__(self) -> None:
        raise ValueError(
            "`optimizer_args.class_name` must not be TorchLBFGS: its line search evaluates the "
            "loss of one batch many times per step, which a stochastic training loop does not "
            "offer; use TorchAdamW"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchNAdamArgs(BaseOptimizerArgs):
    """Adam with Nesterov momentum (Dozat 2016)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.NAdam
    class_name: Literal["TorchNAdam"] = "TorchNAdam"
    """The optimizer."""
    class_args: NAdamClassArgs = field(default_factory=NAdamClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRAdamArgs(BaseOptimizerArgs):
    """Rectified Adam (Liu et al. 2019, arXiv:1908.03265)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.RAdam
    class_name: Literal["TorchRAdam"] = "TorchRAdam"
    """The optimizer."""
    class_args: RAdamClassArgs = field(default_factory=RAdamClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRMSpropArgs(BaseOptimizerArgs):
    """RMSprop (Hinton, lecture 6e)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.RMSprop
    class_name: Literal["TorchRMSprop"] = "TorchRMSprop"
    """The optimizer."""
    class_args: RMSpropClassArgs = field(default_factory=RMSpropClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRpropArgs(BaseOptimizerArgs):
    """Resilient backpropagation (Riedmiller and Braun 1993)."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Rprop
    class_name: Literal["TorchRprop"] = "TorchRprop"
    """The optimizer."""
    class_args: RpropClassArgs = field(default_factory=RpropClassArgs)
    """Its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSGDArgs(BaseOptimizerArgs):
    """Stochastic gradient descent with optional momentum."""

    torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD
    class_name: Literal["TorchSGD"] = "TorchSGD"
    """The optimizer."""
    class_args: SGDClassArgs = field(default_factory=SGDClassArgs)
    """Its arguments."""


def _class_name(value: Any) -> str | None:
    # Called by pydantic with a mapping (a file), an instance (a default) or anything else.
    return tag_of(value, "class_name", default="TorchAdamW")


OptimizerArgs = Annotated[
    Annotated[TorchAdadeltaArgs, Tag("TorchAdadelta")]
    | Annotated[TorchAdagradArgs, Tag("TorchAdagrad")]
    | Annotated[TorchAdamArgs, Tag("TorchAdam")]
    | Annotated[TorchAdamaxArgs, Tag("TorchAdamax")]
    | Annotated[TorchAdamWArgs, Tag("TorchAdamW")]
    | Annotated[TorchASGDArgs, Tag("TorchASGD")]
    | Annotated[TorchLBFGSArgs, Tag("TorchLBFGS")]
    | Annotated[TorchNAdamArgs, Tag("TorchNAdam")]
    | Annotated[TorchRAdamArgs, Tag("TorchRAdam")]
    | Annotated[TorchRMSpropArgs, Tag("TorchRMSprop")]
    | Annotated[TorchRpropArgs, Tag("TorchRprop")]
    | Annotated[TorchSGDArgs, Tag("TorchSGD")],
    Discriminator(_class_name),
]
