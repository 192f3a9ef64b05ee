"""What every dataset entry of a run file has in common."""


def check_entry(
    data_name: str, data_sampling_ratio: float | None, max_tokens: dict[str, int | None]
) -> None:
    """Refuse values that no kind of dataset can take.

    Args:
        data_name: Name of the entry in metrics and errors.
        data_sampling_ratio: Share of the mixture, any positive number, or `None`.
        max_tokens: Limits in tokens by the name of their setting; `None` is no limit.

    Raises:
        ValueError: Names the setting, the value and what is allowed.
    """
    if not data_name:
        raise ValueError("`data_name` must not be empty: it names the dataset in metrics")
    if data_sampling_ratio is not None and not data_sampling_ratio > 0:
        raise ValueError(
            f"`data_sampling_ratio` of `{data_name}` must be a positive number, "
            f"got {data_sampling_ratio}"
        )
    for setting, limit in max_tokens.items():
        if limit is not None and limit < 1:
            raise ValueError(
                f"`{setting}` of `{data_name}` must be at least 1 or absent, got {limit}"
            )


def check_no_text_settings(
    class_name: str,
    data_name: str,
    *,
    input_format: str,
    output_format: str,
    max_tokens: dict[str, int | None],
) -> None:
    """Refuse settings of text examples on a dataset that holds tokens.

    Args:
        class_name: Kind of the dataset, for the message.
        data_name: Name of the entry, for the message.
        input_format: Must be left at `__input__`.
        output_format: Must be left at `__output__`.
        max_tokens: Limits by the name of their setting; all must be absent.

    Raises:
        ValueError: Names the setting that has no meaning here.
    """
    given = {
        "input_format": input_format != "__input__",
        "output_format": output_format != "__output__",
        **{name: limit is not None for name, limit in max_tokens.items()},
    }
    for setting, is_given in given.items():
        if is_given:
            raise ValueError(
                f"`{setting}` has no meaning for `{class_name}` (`{data_name}`): "
                "it holds tokens, not text; remove the setting"
            )
