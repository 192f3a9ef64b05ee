"""Document offsets and positions against a loop over tokens."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lme_data.packing import document_offsets, document_positions, ignore_last_labels


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    data=st.data(),
)
def test_documents_end_at_eos_and_at_row_ends(rows, length, data):
    ids = data.draw(st.lists(st.integers(0, 2), min_size=rows * length, max_size=rows * length))
    input_ids = np.array(ids, np.int64).reshape(rows, length)
    offsets, positions, position = [0], [], 0
    for number, token in enumerate(ids):
        positions.append(position)
        position += 1
        if token == 0 or number % length == length - 1:
            offsets.append(number + 1)
            position = 0
    found = document_offsets(input_ids, 0)
    assert found.dtype == np.int32
    assert found.tolist() == offsets
    assert document_positions(found).tolist() == positions


def test_label_of_a_documents_last_token_is_ignored():
    input_ids = np.array([[5, 0, 6, 7], [8, 9, 5, 0]])
    labels = np.array([[0, 6, 7, 8], [9, 5, 0, 6]])
    ignore_last_labels(labels, input_ids, 0)
    # Row ends without an end of text keep their label: the next token is the document's own.
    assert labels.tolist() == [[0, -100, 7, 8], [9, 5, 0, -100]]
