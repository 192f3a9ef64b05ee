"""Fill-in-the-middle: nothing is lost, and a place decides everything."""

import numpy as np
import pytest

from lme_data.fim import FillInTheMiddle


@pytest.fixture
def row(tokenizer):
    texts = ["def add(one, two):", "return one", "x"]
    eos = tokenizer.eos_token_id
    ids = [i for text in texts for i in (*tokenizer.encode(text), eos)]
    return np.array(ids + [eos] * 40, np.int64)


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_parts_put_back_give_the_document(tokenizer, row, spm_rate):
    eos = tokenizer.eos_token_id
    prefix, middle, suffix = (
        tokenizer.token_id(f"<fim_{name}>") for name in ("prefix", "middle", "suffix")
    )
    found = FillInTheMiddle(tokenizer, rate=1.0, spm_rate=spm_rate, seed=1)(row, 5)
    assert len(found) == len(row)
    document = found[: int(np.flatnonzero(found == eos)[0])].tolist()
    at_suffix, at_middle = document.index(suffix), document.index(middle)
    assert document[0] == prefix
    if spm_rate == 0.0:
        parts = (
            document[1:at_suffix],
            document[at_middle + 1 :],
            document[at_suffix + 1 : at_middle],
        )
        text = "".join(tokenizer.decode(part) for part in parts)
    else:
        assert at_suffix == 1
        text = tokenizer.decode(document[at_middle + 1 :]) + tokenizer.decode(document[2:at_middle])
    assert text == "def add(one, two):"


def test_rearranging_depends_on_seed_and_place_only(tokenizer, row):
    one, other = (FillInTheMiddle(tokenizer, rate=0.5, spm_rate=0.5, seed=1) for _ in range(2))
    for place in (3, 0, 7):
        other(row, 99)
        assert one(row, place).tolist() == other(row, place).tolist()
    assert len({tuple(one(row, place).tolist()) for place in range(20)}) > 10


def test_rate_zero_changes_nothing(tokenizer, row):
    assert (FillInTheMiddle(tokenizer, rate=0.0, spm_rate=0.5, seed=1)(row, 0) == row).all()


def test_row_that_grows_is_cut_and_one_that_shrinks_is_filled(tokenizer):
    row = np.array(tokenizer.encode("def add(one, two): return"), np.int64)
    found = FillInTheMiddle(tokenizer, rate=1.0, spm_rate=0.0, seed=1)(row, 0)
    assert len(found) == len(row)


def test_missing_tokens_are_named(tmp_path):
    from lme_data.tokenizer import train_byte_level_bpe

    (tmp_path / "t").write_text("text")
    plain = train_byte_level_bpe([tmp_path / "t"], vocab_size=260)
    with pytest.raises(ValueError, match="<fim_prefix>"):
        FillInTheMiddle(plain, rate=1.0, spm_rate=0.0, seed=1)
