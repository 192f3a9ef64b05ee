"""Proof of a conversion: both models run on the same tokens, and their logits compared."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lme_convert.directory import ModelDirectory
from lme_convert.errors import CertificateError
from lme_convert.layout import UNROUNDED
from lme_convert.settings import Settings

DEFAULT_TOLERANCE = 1e-5
"""Largest logit difference allowed, in units of the largest absolute logit.

Both sides compute in float32 in different order; on random small models they differ by 1e-6. In
units of the logits, because those of a model before training are small, and so is the harm that a
wrong mapping does to them."""

_LONG_PROMPT_TOKENS = 256
_SHORT_PROMPT_SHAPE = (2, 33)


class BuiltModel(Protocol):
    """What a certificate asks of a model of ours, in evaluation mode, fp32, on CPU."""

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits of shape (B, S, V) for token ids of shape (B, S), int64."""
        ...

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """The residual stream, (B, S, H) each, without the norm before the head.

        What enters the first block, then what leaves each block: one more than there are blocks.
        """
        ...


BuildModel = Callable[[Mapping[str, Any], Mapping[str, Tensor]], BuiltModel]
"""Builds a model of ours from `config.json` and its tensors by name, which are fp32 on CPU and read
from disk when asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was compared, and how far apart the two sides were."""

    status: str
    """`certified` or `not certified`."""
    reason: str | None = None
    """Why not."""
    tolerance: float | None = None
    """See `DEFAULT_TOLERANCE`."""
    max_logit_difference: float | None = None
    """Largest absolute difference of two logits."""
    max_logit: float | None = None
    """Largest absolute logit of the HuggingFace model."""
    kl: float | None = None
    """Largest KL divergence of the next-token distributions over all positions, in nats."""
    first_differing_layer: str | None = None
    """`embedding`, `block <index>` or `head`, where the two first differ by more than the
    tolerance; null where nowhere."""
    prompts: list[list[int]] | None = None
    """Shapes of the batches of token ids, (rows, tokens)."""

    def to_dict(self) -> dict[str, Any]:
        """Contents for `conversion.json`."""
        return asdict(self)


class TensorMapping(Mapping[str, Tensor]):
    """Tensors of a directory by name, read when asked for, in fp32.

    Args:
        directory: Of ours.
        rounded_to: Dtype that floating-point tensors are rounded to on the way; `None` is none.
    """

    def __init__(self, directory: ModelDirectory, rounded_to: torch.dtype | None = None) -> None:
        self._directory = directory
        self._rounded_to = rounded_to

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._directory:
            raise KeyError(name)
        rounded_to = None if name.endswith(UNROUNDED) else self._rounded_to
        return _round(self._directory.tensor(name), rounded_to)

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.names)

    def __len__(self) -> int:
        return len(self._directory.names)


def certify(
    source: Path | str,
    output: Path | str,
    build_model: BuildModel | None = None,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    rounded_to: torch.dtype | None = None,
) -> Certificate:
    """Run the HuggingFace model and ours on fixed prompts, in fp32 on CPU, and compare.

    One model is in memory at a time.

    Args:
        source: Model directory that was converted; either it or `output` is one of ours.
        output: Model directory that came out.
        build_model: Builds ours. `None` certifies nothing and says so.
        tolerance: See `DEFAULT_TOLERANCE`.
        rounded_to: Dtype that the conversion rounded to: both models get rounded weights, so that
            what is compared is the translation and not the rounding.

    Returns:
        The comparison; `not certified` only without `build_model`.

    Raises:
        CertificateError: If logits differ by more than the tolerance, naming the first differing
            layer; if transformers does not load the model in full; if it is not installed; or if
            not exactly one of the two directories is ours.
    """
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be above 0, got {tolerance}")
    if build_model is None:
        return Certificate(status="not certified", reason="no builder of our model was given")
    first, second = ModelDirectory(source), ModelDirectory(output)
    if first.is_ours == second.is_ours:
        raise CertificateError(
            f"one of `{first.path}` and `{second.path}` must be a directory of ours, the other of "
            f"a HuggingFace family; both are {first.model_type} and {second.model_type}"
        )
    ours, theirs = (first, second) if first.is_ours else (second, first)
    config = Settings(ours.config, str(ours.path))
    batches = make_prompts(config.integer("vocab_size"), config.integer("max_position_embeddings"))
    expected = _run_theirs(theirs.path, batches, rounded_to)
    model = build_model(ours.config, TensorMapping(ours, rounded_to))
    with torch.no_grad():
        actual = [(model.logits(ids), model.hidden_states(ids)) for ids in batches]
    return _compare(expected, actual, batches, tolerance)


def make_prompts(vocab_size: int, max_position_embeddings: int) -> list[Tensor]:
    """Make the fixed prompts: one long row, and two short ones.

    Args:
        vocab_size: Ids lie below it.
        max_position_embeddings: No prompt is longer.

    Returns:
        int64, (1, up to 256) and (2, up to 33): the same for the same arguments, on any machine.
    """
    batches = []
    for seed, (rows, tokens) in enumerate(((1, _LONG_PROMPT_TOKENS), _SHORT_PROMPT_SHAPE)):
        tokens = min(tokens, max_position_embeddings)
        index = torch.arange(rows * tokens, dtype=torch.int64) + 1000 * seed
        # A linear congruential step, then its high bits: spread over the vocabulary, no generator.
        spread = (index * 1103515245 + 12345) % 2**31 // 2**7
        batches.append((spread % vocab_size).view(rows, tokens))
    return batches


Run = tuple[Tensor, list[Tensor]]
"""Logits (B, S, V) and hidden states (B, S, H)."""


def _round(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.float()


def _run_theirs(path: Path, batches: list[Tensor], rounded_to: torch.dtype | None) -> list[Run]:
    try:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 (an extra, and heavy)
    except ImportError as error:
        raise CertificateError(
            "a certificate runs the HuggingFace model, which needs the extra `hf`: "
            "`pip install 'lme-convert[hf]'`"
        ) from error
    # Typed as one model: the pair is what `output_loading_info` asks for.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise CertificateError(
                f"transformers does not load `{path}` in full: {kind.replace('_', ' ')} "
                f"{', '.join(names[:3])}"
            )
    model.eval()
    runs = []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_round(parameter, rounded_to))
        for ids in batches:
            with _Residual(model.get_decoder().layers) as residual:
                logits = model(input_ids=ids, use_cache=False).logits
            runs.append((logits, residual.states))
    return runs


class _Residual:
    """Keeps what enters the first and what leaves every one of their layers."""

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        self.states: list[Tensor] = []
        self._layers = layers

    def __enter__(self) -> "_Residual":
        def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self.states.append(args[0] if args else kwargs["hidden_states"])

        def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
            # Layers return the stream, or a tuple that starts with it.
            self.states.append(output[0] if isinstance(output, tuple) else output)

        self._hooks = [self._layers[0].register_forward_pre_hook(before, with_kwargs=True)]
        self._hooks += [layer.register_forward_hook(after) for layer in self._layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _compare(
    expected: list[Run], actual: list[Run], batches: list[Tensor], tolerance: float
) -> Certificate:
    for (theirs, their_states), (ours, our_states) in zip(expected, actual, strict=True):
        if theirs.shape != ours.shape or len(their_states) != len(our_states):
            raise CertificateError(
                f"their logits have shape {tuple(theirs.shape)} and {len(their_states)} states of "
                f"the residual stream; ours {tuple(ours.shape)} and {len(our_states)}"
            )
    pairs = [(theirs, ours) for (theirs, _), (ours, _) in zip(expected, actual, strict=True)]
    difference = max(_difference(theirs, ours) for theirs, ours in pairs)
    max_logit = max(theirs.abs().max().item() for theirs, _ in pairs)
    certificate = Certificate(
        status="certified",
        tolerance=tolerance,
        max_logit_difference=difference,
        max_logit=max_logit,
        kl=max(_kl(theirs, ours) for theirs, ours in pairs),
        first_differing_layer=_first_differing(expected, actual, tolerance),
        prompts=[list(ids.shape) for ids in batches],
    )
    # Written so that NaN fails.
    if not difference <= tolerance * max_logit:
        raise CertificateError(
            f"the two models do not agree: largest logit difference {difference:.3g} at logits up "
            f"to {max_logit:.3g} and `tolerance` {tolerance:g}, KL {certificate.kl:.3g} nats, "
            f"first differing layer: {certificate.first_differing_layer or 'head'}"
        )
    return certificate


def _first_differing(expected: list[Run], actual: list[Run], tolerance: float) -> str | None:
    for layer in range(len(expected[0][1])):
        for (_, theirs), (_, ours) in zip(expected, actual, strict=True):
            scale = theirs[layer].abs().max().item()
            if not _difference(theirs[layer], ours[layer]) <= tolerance * scale:
                return "embedding" if layer == 0 else f"block {layer - 1}"
    for (theirs, _), (ours, _) in zip(expected, actual, strict=True):
        if not _difference(theirs, ours) <= tolerance * theirs.abs().max().item():
            return "head"
    return None


def _difference(theirs: Tensor, ours: Tensor) -> float:
    # In fp64: NaN and infinity on either side give NaN, which fails every comparison.
    return (theirs.double() - ours.double()).abs().max().item()


def _kl(theirs: Tensor, ours: Tensor) -> float:
    reference = theirs.double().log_softmax(-1)
    other = ours.double().log_softmax(-1)
    return (reference.exp() * (reference - other)).sum(-1).max().item()
