"""Training, saving and loading tokenizers."""

import pytest

from lme_data.tokenizer import TokenizerArgs, load_tokenizer, train_byte_level_bpe


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("low lower lowest, naïve \U0001f600 ".encode() * 50 + b"\xff\xfe")
    return path


def test_bytes_survive_encoding(text):
    tokenizer = train_byte_level_bpe([text], vocab_size=270)
    for sample in ("low lower", "unseen wörds \U0001f680\n\ttabs", "", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.vocab_size == 270
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer.encode("lower")) < 5


def test_training_is_reproducible(text):
    one, other = (train_byte_level_bpe([text], vocab_size=270) for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != train_byte_level_bpe([text], vocab_size=262).fingerprint()


def test_saved_tokenizer_is_loaded_from_folder_and_file(text, tmp_path):
    trained = train_byte_level_bpe(
        [text], vocab_size=270, special_tokens=["<|pad|>", "<|endoftext|>"]
    )
    trained.save(tmp_path / "tok")
    for where in (tmp_path / "tok", tmp_path / "tok" / "tokenizer.json"):
        loaded = load_tokenizer(where)
        assert loaded.encode("lowest naïve") == trained.encode("lowest naïve")
        assert (loaded.eos_token_id, loaded.vocab_size) == (1, 270)
        assert loaded.pad_token_id == 0
        assert loaded.directory == tmp_path / "tok"
        assert loaded.encode_batch(["low", "lower"]) == [
            trained.encode("low"),
            trained.encode("lower"),
        ]


def test_saved_tokenizer_is_the_same_to_transformers(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained = train_byte_level_bpe([text], vocab_size=270)
    trained.save(tmp_path / "tok")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert theirs.encode("lowest naïve") == trained.encode("lowest naïve")
    assert theirs.eos_token_id == trained.eos_token_id


def test_added_special_tokens_are_never_split(text, tmp_path):
    train_byte_level_bpe([text], vocab_size=270).save(tmp_path / "tok")
    loaded = load_tokenizer(tmp_path / "tok", additional_special_tokens=["<fim>"])
    assert loaded.vocab_size == 271
    assert loaded.encode("low<fim>low").count(270) == 1


def test_wrong_arguments_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 257"):
        train_byte_level_bpe([text], vocab_size=256)
    with pytest.raises(ValueError, match="`files` is empty"):
        train_byte_level_bpe([], vocab_size=300)
    with pytest.raises(ValueError, match="`eos_token`"):
        train_byte_level_bpe([text], vocab_size=300, eos_token="<end>")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(text)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="`additional_special_tokens`"):
        TokenizerArgs(additional_special_tokens=["a", "a"])
