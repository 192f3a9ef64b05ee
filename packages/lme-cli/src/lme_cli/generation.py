"""Text from a model and a prompt."""

import torch

from lme_core.architectures.decoder import Decoder
from lme_core.generation import generate
from lme_data.tokenizer import TextTokenizer


def complete(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        model: On any device.
        tokenizer: The model's.
        prompt: Text; an empty one starts from the end-of-text token.
        max_new_tokens: Most tokens to add; it stops earlier at the end of the text.
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Draw from this many likeliest tokens only; all if `None`.
        top_p: Draw from the likeliest tokens that make up this probability; all if `None`.
        seed: Of the draws.

    Returns:
        What was added.

    Raises:
        ValueError: If the prompt is empty and the tokenizer has no end-of-text token.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.eos_token_id is None:
            raise ValueError("the prompt is empty, and the tokenizer has no end-of-text token")
        ids = [tokenizer.eos_token_id]
    device = next(model.parameters()).device
    model.eval()
    new = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(new[0].tolist(), skip_special_tokens=True)
