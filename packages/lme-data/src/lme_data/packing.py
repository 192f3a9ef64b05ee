"""Documents inside rows: where they end, and positions that restart there."""

import numpy as np


def document_offsets(input_ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Cut rows into documents: after every end-of-text token and at every row's end.

    Args:
        input_ids: int64, shape (B, S).
        eos_token_id: The token that ends a document; it belongs to the document it ends.

    Returns:
        Offsets over the flattened B * S tokens, int32, shape (documents + 1,), from 0 to B * S.
    """
    is_last = (input_ids == eos_token_id).reshape(-1)
    is_last[input_ids.shape[1] - 1 :: input_ids.shape[1]] = True
    ends = np.flatnonzero(is_last)
    offsets = np.zeros(len(ends) + 1, np.int32)
    np.add(ends, 1, out=offsets[1:], casting="unsafe")
    return offsets


def document_positions(offsets: np.ndarray) -> np.ndarray:
    """Number the tokens of each document from 0.

    Args:
        offsets: From `document_offsets`.

    Returns:
        int64, shape (B * S,).
    """
    positions = np.arange(int(offsets[-1]), dtype=np.int64)
    positions -= np.repeat(offsets[:-1], np.diff(offsets))
    return positions


def ignore_last_labels(
    labels: np.ndarray, input_ids: np.ndarray, eos_token_id: int, ignore_index: int = -100
) -> None:
    """Ignore the label of each document's last token, in place: it begins another document.

    Args:
        labels: int64, shape (B, S), already shifted.
        input_ids: int64, shape (B, S).
        eos_token_id: The token that ends a document.
        ignore_index: What ignored labels are set to.
    """
    labels[input_ids == eos_token_id] = ignore_index
