"""`lme generate`: text from a model."""

from typing import Annotated

import typer


def generate(
    model: Annotated[
        str, typer.Argument(help="A model directory, a run directory, or a checkpoint.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Divisor of the logits; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from this many likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens only.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="File, folder or name; the model's own if absent.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the accelerator if absent.")
    ] = None,
) -> None:
    """Continue a prompt; the same seed gives the same text."""
    from lme_cli.generation import complete
    from lme_cli.models import find_model, load_model, load_tokenizer_of, pick_device
    from lme_core.training.args import parse_dtype

    source = find_model(model)
    text = load_tokenizer_of(source, tokenizer)
    loaded = load_model(source, device=pick_device(device), dtype=parse_dtype("--dtype", dtype))
    completion = complete(
        loaded,
        text,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    print(f"{prompt}{completion}")
