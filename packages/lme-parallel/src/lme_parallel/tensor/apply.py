"""Cutting a model as a plan says, in place: parameters keep their names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lme_parallel.tensor.collectives import (
    Group,
    average_within,
    copy_in,
    gather_in,
    gather_whole,
    part_out,
    scatter_out,
    share_gradient,
    silent,
    sum_out,
)
from lme_parallel.tensor.cut import Cut
from lme_parallel.tensor.plan import STYLES, Stretch, TensorPlan, children_of
from lme_parallel.tensor.vocabulary import GatheredLogits, Lookup, VocabularyPart


def apply_plan(
    model: nn.Module, plan: TensorPlan, group: Group, *, sequence_parallel: bool
) -> None:
    """Cut a model, and let its modules exchange what they lack; names of parameters stay.

    Args:
        model: Usually on meta. Has `embed`, `blocks`, `residual`, and `linear_nll` and
            `linear_logits` over its vocabulary. Changed in place.
        plan: From `read_plan`.
        group: The processes.
        sequence_parallel: Whether modules of the blocks get and give a part of the sequence.
    """
    _cut_parameters(model, plan)
    for stretch in plan.stretches:
        _cross(stretch, group, sequence_parallel=sequence_parallel)
        if stretch.is_cut:
            _serve_heads(stretch.module, group)
            if group.rank > 0:
                _silence_biases(stretch.module)
    _serve_vocabulary(model, plan, group)
    _serve_ends(model, group, sequence_parallel=sequence_parallel)


def _cut_parameters(model: nn.Module, plan: TensorPlan) -> None:
    # By identity, so that a parameter under two names stays one.
    made: dict[int, nn.Parameter] = {}
    for name, cut in plan.cuts.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = module._parameters[leaf]
        if whole is None:
            raise RuntimeError(f"`{name}` was there when the plan was made")
        if id(whole) not in made:
            made[id(whole)] = _cut_parameter(whole, cut)
    for module in model.modules():
        for leaf, each in module._parameters.items():
            if each is not None and id(each) in made:
                module.register_parameter(leaf, made[id(each)])


def _cut_parameter(whole: nn.Parameter, cut: Cut) -> nn.Parameter:
    return nn.Parameter(cut.take(whole.detach()), requires_grad=whole.requires_grad)


def _cross(stretch: Stretch, group: Group, *, sequence_parallel: bool) -> None:
    """Wrap a module's forward pass in the exchanges before and after it."""
    if not stretch.is_cut and not sequence_parallel:
        return
    forward = stretch.module.forward
    if stretch.is_cut:
        enter = gather_in if sequence_parallel else copy_in
        leave = scatter_out if sequence_parallel else sum_out
    else:
        enter, leave = gather_whole, part_out
    gives_stream = stretch.sums or not stretch.is_cut

    # Only the instance changes: a wrapping module would rename every parameter below it.
    @wraps(forward)
    def crossed(x: Tensor, *others: Any, **options: Any) -> Any:  # the module's own arguments
        result = forward(enter(x, group), *others, **options)
        if not gives_stream:
            return result
        if isinstance(result, Tensor):
            return leave(result, group)
        first, *further = result
        if stretch.is_cut:
            # Losses that every process computed whole, of what it has a share of the gradient of.
            further = tree_map(partial(_share, group=group), further)
        return (leave(first, group), *further)

    stretch.module.forward = crossed


def _share(value: Any, *, group: Group) -> Any:  # a leaf of a result
    if isinstance(value, Tensor) and value.requires_grad:
        return share_gradient(value, group)
    return value


def _serve_heads(module: nn.Module, group: Group) -> None:
    """Tell modules which of their heads are here, and let them ask for what others have."""
    for each in _modules(module):
        if hasattr(each, "part"):
            each.part = (group.rank, group.size)
        if hasattr(each, "gather_channels"):
            each.gather_channels = partial(gather_in, group=group, dim=-1)
        for name, _, _ in children_of(each):
            child = getattr(each, name)
            # A norm that is cut; one that is not has all its channels here.
            if hasattr(child, "average_channels"):
                child.average_channels = partial(average_within, group=group)


def _modules(module: nn.Module) -> Iterator[Any]:
    """Yield a module and those inside, whose attributes only they and the seam know."""
    yield from module.modules()


def _silence_biases(module: nn.Module) -> None:
    """Leave biases behind a sum to the first process; the gradient of each is whole."""
    for each in _modules(module):
        for name, child, style in children_of(each):
            if STYLES[style].bias is not None or getattr(child, "bias", None) is None:
                continue
            if style == "expert_row":
                each.fused = _WithoutExpertBias(each.fused)
            elif isinstance(child, nn.Linear):
                child.forward = _WithoutLinearBias(child)
            else:
                raise ValueError(
                    f"`{name}` of {type(each).__name__} has a bias and is no linear layer, so its"
                    " `shard_plan` cannot be `row`"
                )


@dataclass(frozen=True, slots=True)
class _WithoutLinearBias:
    """The product of a linear layer, whose bias another process adds."""

    layer: nn.Linear

    # The name is the layer's.
    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self.layer.weight, silent(self.layer.bias))


@dataclass(frozen=True, slots=True)
class _WithoutExpertBias:
    """The product of experts, whose second bias another process adds."""

    product: Callable[..., Tensor]

    def __call__(self, *inputs: Any, down_bias: Tensor, **options: Any) -> Tensor:  # the op's own
        return self.product(*inputs, down_bias=silent(down_bias), **options)


def _serve_vocabulary(model: Any, plan: TensorPlan, group: Group) -> None:  # a model of the seam
    if not plan.vocabulary:
        return
    start = group.rank * plan.vocabulary_rows
    part = VocabularyPart(start, plan.vocabulary, group.all_reduce)
    model.linear_nll = partial(model.linear_nll, shard=part)
    model.linear_logits = GatheredLogits(
        model.linear_logits, plan.vocabulary, plan.vocabulary_rows, group
    )
    for _, child, _ in children_of(model):
        if isinstance(child, nn.Embedding):
            child.forward = Lookup(child, start, group)


def _serve_ends(model: Any, group: Group, *, sequence_parallel: bool) -> None:  # as above
    """Cut the sequence after the embedding, and put it together before the vocabulary."""
    enter = gather_in if sequence_parallel else copy_in
    residual = model.residual

    @wraps(residual)
    def gathered(stream: Any) -> Tensor:  # what blocks hand on
        return enter(residual(stream), group)

    model.residual = gathered
    if not sequence_parallel:
        return
    embed = model.embed

    @wraps(embed)
    def cut(batch: Any) -> Any:  # what blocks hand on
        return tree_map(lambda x: part_out(x, group), embed(batch))

    model.embed = cut
