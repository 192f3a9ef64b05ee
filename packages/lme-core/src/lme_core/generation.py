"""Sampling from a decoder, a token at a time, over its cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lme_core.architectures.cache import DecoderCache
from lme_core.architectures.decoder import Decoder
from lme_core.layers import random


def left_pad(
    prompts: Sequence[Sequence[int]], *, pad_token_id: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Stack prompts of different lengths.

    Args:
        prompts: Token ids, at least one a prompt.
        pad_token_id: Id that fills the left.
        device: Where the result lives.

    Returns:
        `input_ids` int64 and `valid` bool, both (B, S).

    Raises:
        ValueError: If there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("`prompts` must hold at least one prompt, and each at least one token")
    length = max(len(prompt) for prompt in prompts)
    rows = [[pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    valid = [[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(valid, device=device)


def generate(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Tensor:
    """Continue prompts; arguments as in `stream`.

    Args:
        model: See `stream`.
        input_ids: See `stream`.
        max_new_tokens: See `stream`.
        valid: See `stream`.
        temperature: See `stream`.
        top_k: See `stream`.
        top_p: See `stream`.
        seed: See `stream`.
        eos_token_id: See `stream`.
        pad_token_id: See `stream`.

    Returns:
        New tokens only, int64, (B, T) with T at most `max_new_tokens`.
    """
    tokens = stream(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        valid=valid,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return torch.stack([*tokens], dim=1)


def stream(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts and give each new token as it comes.

    Args:
        model: A decoder with values, on the device of `input_ids`.
        input_ids: Prompts, int64, (B, S), padded on the left.
        max_new_tokens: Most tokens to make, at least 1.
        valid: bool, (B, S), false on padding; `None` for none.
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Keep this many likeliest tokens; `None` for all.
        top_p: Keep the likeliest tokens that together have this probability; `None` for all.
        seed: Row b's draws depend on this, b and the step alone.
        eos_token_id: Id or ids that end a row; when all rows ended, so does the stream.
        pad_token_id: What an ended row gives; absent: its (first) `eos_token_id`.

    Yields:
        int64, (B,).

    Raises:
        ValueError: If an argument is out of range, or prompts and new tokens pass the model's
            learned positions.
    """
    _check(model, input_ids, max_new_tokens, temperature, top_k, top_p)
    ends = [] if eos_token_id is None else [eos_token_id]
    ends = [each for end in ends for each in ([end] if isinstance(end, int) else end)]
    stop = input_ids.new_tensor(ends)
    pad = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    B, S = input_ids.shape
    key = torch.tensor(random.key_of(seed, "generation"), device=input_ids.device)
    rows = random.mix(key, torch.arange(1, B + 1, device=input_ids.device))
    ended = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    cache = model.new_cache(B, S + max_new_tokens)
    batch = {"input_ids": input_ids} if valid is None else {"input_ids": input_ids, "valid": valid}
    for step in range(max_new_tokens):
        logits = next_logits(model, batch, cache)
        draw = random.uniform(rows, step + 1)
        token = sample(logits, draw, temperature=temperature, top_k=top_k, top_p=top_p)
        token = token.masked_fill(ended, pad)
        yield token
        if ends:
            ended = ended | torch.isin(token, stop)
            if ended.all():
                return
        batch = {"input_ids": token[:, None]}


@torch.inference_mode()
def next_logits(model: Decoder, batch: dict[str, Tensor], cache: DecoderCache) -> Tensor:
    """Run tokens through the model and its cache.

    Args:
        model: The decoder.
        batch: `input_ids` (B, S), and `valid` where rows are padded on the left.
        cache: Of the tokens before; grows.

    Returns:
        Logits of what follows the last token, (B, V).
    """
    batch = cache.place(batch)
    stream, _ = model.run_blocks(model.embed(batch), model.context(batch, cache), cache)
    logits = model.head(stream.last_token()).logits
    if logits is None:
        raise RuntimeError("a head without labels gives logits")
    return logits[:, 0]


def sample(
    logits: Tensor,
    draw: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Choose a token from each row.

    Args:
        logits: Shape (B, V).
        draw: Uniform in [0, 1), shape (B,).
        temperature: See `stream`.
        top_k: See `stream`.
        top_p: See `stream`; applied to what `top_k` leaves.

    Returns:
        int64, (B,): the first token, in order of probability, up to which the probabilities sum to
        more than `draw`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    kept = scores.shape[-1] if top_k is None else min(top_k, scores.shape[-1])
    scores, tokens = scores.topk(kept, dim=-1)
    probability = scores.softmax(dim=-1)
    reached = probability.cumsum(dim=-1)
    if top_p is not None:
        # A token stays if those before it have not reached the bound, so the first always does.
        probability = probability.where(reached - probability < top_p, 0.0)
        reached = probability.cumsum(dim=-1)
    threshold = draw.to(reached.dtype)[:, None] * reached[:, -1:]
    choice = torch.searchsorted(reached, threshold, right=True)
    # Rounding may leave the threshold at the sum: then the last token that is kept.
    last = (probability > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(choice, last)).squeeze(-1)


def _check(
    model: Decoder,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"`input_ids` must have shape (B, S), got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}")
    length, most = input_ids.shape[1] + max_new_tokens, model.config.max_position_embeddings
    if model.position_embedding is not None and length > most:
        raise ValueError(
            f"`max_new_tokens` after {input_ids.shape[1]} tokens makes {length}, which passes the "
            f"{most} learned positions (`max_position_embeddings`)"
        )
