"""Tokenizers: load one from disk or the hub, train one."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerArgs:
    """Which tokenizer a run uses."""

    tokenizer_name: str | None = None
    """A `tokenizer.json`, a folder that holds one, or a hub name; absent: the model's."""
    additional_special_tokens: list[str] | None = None
    """Tokens added to the vocabulary, never split."""

    def __post_init__(self) -> None:
        tokens = self.additional_special_tokens
        if tokens is not None and (not all(tokens) or len(set(tokens)) != len(tokens)):
            raise ValueError(
                "`additional_special_tokens` must be distinct texts that are not empty, "
                f"got {tokens}"
            )


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer and the ids that training needs to know.

    Loaded from disk it is the `tokenizers` library's object; nothing else is needed to encode.
    """

    backend: Tokenizer
    """The tokenizer itself."""
    name: str
    """Where it came from, as the user gave it."""
    eos_token_id: int | None
    """End of text; ends documents and answers."""
    bos_token_id: int | None
    """Begin of text."""
    pad_token_id: int | None
    """Padding."""
    directory: Path | None = None
    """Folder of its files, to copy beside a model; `None` for one that is not on disk."""
    chat_template: str | None = field(default=None, repr=False)
    """Jinja text from the tokenizer's configuration; never run here."""

    @property
    def vocab_size(self) -> int:
        """Smallest number of embeddings that holds every id, added tokens included."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return max(vocabulary.values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of one text."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Token ids of many texts, on as many threads as the library takes."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of one token as it is written in the vocabulary, or `None`."""
        return self.backend.token_to_id(token)

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's serialised form, in hexadecimal."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder.

        Args:
            directory: Made if absent. `load_tokenizer` and transformers read it back.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key, token_id in (
            ("eos_token", self.eos_token_id),
            ("bos_token", self.bos_token_id),
            ("pad_token", self.pad_token_id),
        ):
            if token_id is not None:
                config[key] = self.backend.id_to_token(token_id)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


_USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
_USUAL_BOS = ("<|begin_of_text|>", "<s>", "<bos>")
_USUAL_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>")


def load_tokenizer(
    name: str | Path, *, additional_special_tokens: Sequence[str] | None = None
) -> TextTokenizer:
    """Load a tokenizer from a `tokenizer.json`, a folder, or the hub.

    Args:
        name: File, folder with a `tokenizer.json`, or a hub name (needs the `hf` extra).
        additional_special_tokens: Tokens to add to the vocabulary.

    Returns:
        The tokenizer with its end, begin and padding ids where they are known: from
        `tokenizer_config.json` or `special_tokens_map.json` beside it, else by usual spellings.

    Raises:
        ValueError: If nothing is found there, or the file is no tokenizer.
    """
    path = Path(name)
    # Hub names are `name` or `owner/name`.
    if not path.exists() and (len(path.parts) > 2 or str(name).startswith(("..", "~"))):
        raise ValueError(
            f"`tokenizer_name`: {name} does not exist: give a `tokenizer.json`, a folder that "
            "holds one, or a hub name"
        )
    if not path.exists() or (path.is_dir() and not (path / "tokenizer.json").exists()):
        return _from_transformers(str(name), additional_special_tokens)
    directory = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises plain `Exception` for every malformed file.
        raise ValueError(f"`tokenizer_name`: {file} is not a tokenizer file: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = {**_read_json(directory / "special_tokens_map.json")}
    config.update(_read_json(directory / "tokenizer_config.json"))
    _add_special_tokens(backend, additional_special_tokens)
    template = config.get("chat_template")
    return TextTokenizer(
        backend=backend,
        name=str(name),
        eos_token_id=_special_id(backend, config.get("eos_token"), _USUAL_EOS),
        bos_token_id=_special_id(backend, config.get("bos_token"), _USUAL_BOS),
        pad_token_id=_special_id(backend, config.get("pad_token"), _USUAL_PAD),
        directory=directory,
        chat_template=template if isinstance(template, str) else None,
    )


def train_byte_level_bpe(
    files: Sequence[str | Path],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    eos_token: str = "<|endoftext|>",
) -> TextTokenizer:
    """Train a byte-level BPE tokenizer on text files.

    Args:
        files: UTF-8 text files; bytes that are no UTF-8 are replaced.
        vocab_size: Size of the vocabulary, special tokens included; at least 256 more than they.
        special_tokens: Take the first ids, in this order.
        eos_token: Which of them ends a document.

    Returns:
        The tokenizer; the same files give the same merges.

    Raises:
        ValueError: If there are no files, `vocab_size` is too small, or `eos_token` is not among
            `special_tokens`.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest} (256 bytes and the special tokens), "
            f"got {vocab_size}"
        )
    if not files:
        raise ValueError("`files` is empty: a tokenizer needs text to be trained on")
    if eos_token not in special_tokens:
        raise ValueError(f"`eos_token` {eos_token!r} must be one of {list(special_tokens)}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(files), trainer=trainer)
    return TextTokenizer(
        backend=backend,
        name="trained",
        eos_token_id=backend.token_to_id(eos_token),
        bos_token_id=None,
        pad_token_id=None,
    )


def _texts(files: Sequence[str | Path]) -> Iterator[str]:
    for file in files:
        yield Path(file).read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`tokenizer_name`: {path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _special_id(backend: Tokenizer, declared: object, usual: Sequence[str]) -> int | None:
    if isinstance(declared, dict):
        declared = declared.get("content")
    if isinstance(declared, str):
        return backend.token_to_id(declared)
    for token in usual:
        token_id = backend.token_to_id(token)
        if token_id is not None:
            return token_id
    return None


def _add_special_tokens(backend: Tokenizer, tokens: Sequence[str] | None) -> None:
    if tokens:
        backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])


def _from_transformers(name: str, tokens: Sequence[str] | None) -> TextTokenizer:
    try:
        # Optional: the `hf` extra.
        from transformers import AutoTokenizer  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"`tokenizer_name`: {name!r} is neither a file nor a folder with a `tokenizer.json`; "
            "loading by hub name needs `pip install 'lme-data[hf]'`"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer_name`: {name!r} was found neither on disk nor on the hub: {error}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"`tokenizer_name`: {name!r} has no fast tokenizer; convert it to a `tokenizer.json`"
        )
    backend.no_padding()
    backend.no_truncation()
    _add_special_tokens(backend, tokens)
    template = getattr(loaded, "chat_template", None)
    return TextTokenizer(
        backend=backend,
        name=name,
        eos_token_id=loaded.eos_token_id,
        bos_token_id=loaded.bos_token_id,
        pad_token_id=loaded.pad_token_id,
        directory=Path(name) if Path(name).is_dir() else None,
        chat_template=template if isinstance(template, str) else None,
    )
