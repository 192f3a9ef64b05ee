"""From `datasets` entries to batches."""

import dataclasses
import json

import pytest
import torch

from lme_data.build import build_loaders
from lme_data.dataset import (
    DebugClassArgs,
    DebugDatasetArgs,
    HuggingFaceClassArgs,
    HuggingFaceDatasetArgs,
    MegatronClassArgs,
    MegatronDatasetArgs,
)
from lme_data.manifest import TokenizerInfo


def megatron(name="m", ratio=None, **class_args):
    chosen = {"sequence_length": 8, "split": "80,10,10", "num_workers": 0, **class_args}
    if "data_path" not in chosen:
        chosen.pop("split")
    return MegatronDatasetArgs(
        data_name=name, data_sampling_ratio=ratio, class_args=MegatronClassArgs(**chosen)
    )


def build(datasets, **settings):
    chosen = {"micro_batch_size": 2, "global_batch_size": 4, "num_training_steps": 10, **settings}
    return build_loaders(datasets, **chosen)


def ids(loader, count):
    return torch.cat([next(loader)["input_ids"] for _ in range(count)])


def test_splits_share_no_document(write_corpus):
    prefix = write_corpus([10] * 100, modulus=1000)
    loaders = build([megatron(data_path=prefix)])
    train = ids(loaders.train, 20)
    assert int(train.max()) < 800
    assert loaders.val is not None
    assert loaders.test is not None
    for loader, low, high in ((loaders.val, 800, 900), (loaders.test, 900, 1000)):
        seen = torch.cat([batch["input_ids"] for batch in loader])
        assert low <= int(seen.min())
        assert int(seen.max()) < high
        # 10 batches of 4 are asked; one epoch has 12 samples.
        assert loader.num_samples == (100 - 1) // 8
        again = torch.cat([batch["input_ids"] for batch in loader])
        assert (seen == again).all()


def test_corpora_per_split_and_weights(write_corpus):
    one, two = write_corpus([10] * 50, "one"), write_corpus([10] * 50, "two", first=10_000)
    entry = megatron(train_data_path=[1, one, 3, two], val_data_path=[one])
    loaders = build([entry])
    rows = ids(loaders.train, 20)
    assert int((rows[:, 0] >= 10_000).sum()) == 30
    assert loaders.source_names == ("m/one", "m/two")
    assert loaders.test is None
    assert loaders.val is not None


def test_corpora_without_weights_come_one_after_another(write_corpus):
    one, two = write_corpus([10] * 30, "one"), write_corpus([10] * 10, "two", first=10_000)
    loaders = build([megatron(train_data_path=[one, two])])
    is_second = (ids(loaders.train, 20)[:, 0] >= 10_000).tolist()
    # Samples asked of each: its share of the sequences and half a percent more, rounded up.
    assert is_second == [False] * 31 + [True] * 9


def test_entries_are_mixed_by_ratio_and_evaluated_apart(write_corpus):
    one, two = write_corpus([10] * 80, "one"), write_corpus([10] * 80, "two", first=10_000)
    entries = [megatron("a", 3, data_path=one), megatron("b", 1.0, data_path=two)]
    loaders = build(entries)
    batches = [next(loaders.train) for _ in range(20)]
    sources = torch.cat([batch["source"] for batch in batches])
    first = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    assert loaders.source_names == ("a", "b")
    assert ((first >= 10_000) == (sources == 1)).all()
    assert int((sources == 1).sum()) == 10
    assert set(loaders.val_groups) == {"a", "b"}
    only_b = torch.cat([batch["input_ids"] for batch in loaders.val_groups["b"]])
    assert int(only_b.min()) >= 10_000
    state = loaders.train.state_dict()
    assert state["cursors"] == {"a": 30, "b": 10}


def test_validation_can_pass_every_dataset_once(write_corpus):
    one, two = write_corpus([10] * 80, "one"), write_corpus([10] * 80, "two", first=10_000)
    entries = [megatron("a", 3, data_path=one), megatron("b", 1, data_path=two)]
    loaders = build(entries, ignore_sampling_proportion_for_validation=True)
    assert loaders.val is not None
    assert loaders.val.num_samples == 2 * ((80 - 1) // 8)


def test_entry_without_a_split_leaves_it_to_the_others(write_corpus):
    one, two = write_corpus([10] * 80, "one"), write_corpus([10] * 80, "two", first=10_000)
    has_val = megatron("a", 1, train_data_path=[one], val_data_path=[one])
    has_none = megatron("b", 9, train_data_path=[two])
    loaders = build([has_val, has_none], eval_steps=100)
    assert loaders.val is not None
    # Every sample of the one epoch, although the entry's share of training is a tenth.
    assert loaders.val.num_samples == (800 - 1) // 8
    assert sum(int((batch["labels"] != -100).sum()) for batch in loaders.val) == 8 * 99
    neither = [megatron("a", train_data_path=[one]), megatron("b", train_data_path=[two])]
    assert build(neither).val is None


def test_every_dataset_once_of_corpora_one_after_another(write_corpus):
    one, two = write_corpus([10] * 80, "one"), write_corpus([10] * 80, "two", first=10_000)
    entries = [
        megatron("a", 1, train_data_path=[one], val_data_path=[one, two]),
        megatron("b", 1, train_data_path=[one], val_data_path=[two]),
    ]
    loaders = build(entries, ignore_sampling_proportion_for_validation=True, eval_steps=2)
    assert loaders.val is not None
    assert sum(int((batch["labels"] != -100).sum()) for batch in loaders.val) > 0


def test_validation_groups_of_weighted_split_paths(write_corpus):
    one, two = write_corpus([10] * 80, "one"), write_corpus([10] * 80, "two", first=10_000)
    groups = [{"code": [1, two]}, {"both": [0.5, one, 0.5, two]}]
    entry = megatron(train_data_path=[one], val_weighted_split_paths=groups)
    loaders = build([entry])
    assert set(loaders.val_groups) == {"code", "both"}
    assert int(next(iter(loaders.val_groups["code"]))["input_ids"].min()) >= 10_000


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_training_can_be_longer_only_in_the_stable_order(write_corpus, order):
    prefix = write_corpus([10] * 100)
    entry = megatron(data_path=prefix, order=order)
    short, long = build([entry]), build([entry], num_training_steps=300)
    for _ in range(4):
        next(short.train)
    state = json.loads(json.dumps(short.train.state_dict()))
    if order == "megatron":
        with pytest.raises(ValueError, match="num_samples"):
            long.train.load_state_dict(state)
    else:
        long.train.load_state_dict(state)
        assert (ids(long.train, 6) == ids(short.train, 6)).all()


def test_stable_order_ignores_batch_sizes_and_ranks(write_corpus):
    prefix = write_corpus([10] * 100)
    entry = megatron(data_path=prefix, order="stable")
    one = ids(build([entry]).train, 12)
    other = build([entry], micro_batch_size=6, global_batch_size=12).train
    assert (ids(other, 4) == one).all()


def test_documents_are_kept_apart_with_the_manifests_end_of_text(write_corpus):
    info = TokenizerInfo(name="t", sha256="", vocab_size=100, eos_token_id=9)
    prefix = write_corpus([10] * 100, modulus=10, tokenizer=info)
    settings = {"reset_attention_mask": True, "reset_position_ids": True}
    loaders = build([megatron(data_path=prefix)], **settings)
    batch = next(loaders.train)
    assert loaders.eos_token_id == 9
    assert batch["cu_seqlens"][-1] == 16
    assert (batch["labels"][batch["input_ids"] == 9] == -100).all()
    bare = write_corpus([10] * 100, "bare", modulus=10)
    with pytest.raises(ValueError, match=r"`tokenizer_args\.tokenizer_name`"):
        build([megatron(data_path=bare)], **settings)


def test_empty_split_with_a_share_is_an_error(write_corpus):
    prefix = write_corpus([10] * 10)
    with pytest.raises(ValueError, match="leaves `val` no document"):
        build([megatron(data_path=prefix, split="99.5,0.5,0")])
    assert build([megatron(data_path=prefix, split="99.5,0.5,0")], evaluate=False).val is None
    assert build([megatron(data_path=prefix, split="1")]).val is None


def test_ids_beyond_the_vocabulary_are_refused_before_the_first_batch(write_corpus):
    prefix = write_corpus([10] * 100)
    with pytest.raises(ValueError, match="ids up to 999, `vocab_size` is 999"):
        build([megatron(data_path=prefix)], vocab_size=999)
    build([megatron(data_path=prefix)], vocab_size=1000)


def test_entries_that_do_not_belong_are_refused(write_corpus):
    prefix = write_corpus([10] * 100)
    text = HuggingFaceDatasetArgs(
        data_name="t", class_args=HuggingFaceClassArgs(data_path="x.jsonl")
    )
    m = megatron(data_path=prefix)
    longer = dataclasses.replace(
        m, data_name="n", class_args=dataclasses.replace(m.class_args, sequence_length=9)
    )
    cases = [
        ([], {}, "`datasets` is empty"),
        ([m, m], {}, "`data_name` must differ"),
        ([m, longer], {}, "`sequence_length` must be the same"),
        ([m, megatron("n", 2, data_path=prefix)], {}, "for every dataset or for none"),
        ([text], {}, "need a `MegatronDataset`"),
        ([m], {"tuning_method": "full_finetuning"}, "needs a `HuggingFaceDataset`"),
        ([megatron(data_path=prefix + "x")], {}, "does not exist"),
    ]
    for datasets, settings, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build(datasets, **settings)


def debug(**class_args):
    chosen = {"num_examples": 50, "sequence_length": 8, **class_args}
    return DebugDatasetArgs(
        data_name="d",
        class_args=DebugClassArgs(**chosen),
        max_input_tokens=3,
        max_output_tokens=2,
    )


def test_debug_dataset_for_pretraining():
    batch = next(build([debug(token_id=7)]).train)
    assert (batch["input_ids"] == 7).all()
    loaders = build([debug(static_examples=False)], vocab_size=11)
    batch = next(loaders.train)
    assert ((batch["input_ids"] + 1) % 11 == batch["labels"]).all()
    assert len(set(batch["input_ids"][:, 0].tolist())) == 2
    assert loaders.val is not None
    with pytest.raises(ValueError, match="must be below the vocabulary"):
        build([debug(token_id=7)], vocab_size=7)
    with pytest.raises(ValueError, match=r"`class_args\.sequence_length`"):
        build([debug(sequence_length=None)])


def test_debug_dataset_for_finetuning():
    loaders = build([debug(static_examples=False)], tuning_method="full_finetuning", vocab_size=99)
    batch = next(loaders.train)
    assert batch["input_ids"][1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["labels"][1].tolist() == [-100, -100, 1, 1, -100, -100, -100, -100]
    assert loaders.val is not None
    assert loaders.val.num_samples == 50


def test_fill_in_the_middle_needs_its_tokens(write_corpus, tokenizer):
    prefix = write_corpus([10] * 100, modulus=200, first=50)
    entry = megatron(data_path=prefix, fim_rate=1.0)
    with pytest.raises(ValueError, match="`fim_rate` needs a tokenizer"):
        build([entry])
    with pytest.raises(ValueError, match="must hold the tokenizer's 300 ids"):
        build([entry], tokenizer=tokenizer, vocab_size=299)
    batch = next(build([entry], tokenizer=tokenizer, vocab_size=300).train)
    assert (batch["input_ids"] == tokenizer.token_id("<fim_prefix>")).any()


@pytest.mark.parametrize("order", ["megatron", "stable"])
@pytest.mark.parametrize("weights", [(), (1, 3)], ids=["in a row", "weighted"])
def test_endless_batches_are_the_same_and_go_on(write_corpus, order, weights):
    paths = [write_corpus([10] * 30, "one"), write_corpus([10] * 20, "two", first=10_000)]
    blend = [part for pair in zip(weights, paths, strict=False) for part in pair] or paths
    entry = megatron(train_data_path=blend, order=order)
    with_end = build([entry]).train
    rows = ids(with_end, 20)
    assert next(with_end, None) is None
    endless = build([entry], is_endless=True).train
    assert torch.equal(ids(endless, 20), rows)
    more = ids(endless, 30)
    # Megatron's order was made for these samples; the stable one has others to come.
    assert torch.equal(more[:40], rows) == (order == "megatron")
    resumed = build([entry], is_endless=True).train
    resumed.load_state_dict(endless.state_dict())
    assert torch.equal(ids(resumed, 3), ids(endless, 3))


def rows_of(datasets, world, steps, state=None):
    """Rows that all ranks read in so many steps, and the state that each of them saves."""
    rows, states = [], []
    for rank in range(world):
        settings = {"micro_batch_size": 4 // world, "data_rank": rank, "data_world_size": world}
        each = build(datasets, **settings).train
        if state is not None:
            each.load_state_dict(json.loads(state))
        rows += ids(each, steps).tolist()
        states.append(json.dumps(each.state_dict()))
    assert len(set(states)) == 1
    return sorted(rows), states[0]


@pytest.mark.parametrize("order", ["megatron", "stable"])
@pytest.mark.parametrize("world", [1, 4])
def test_what_is_left_of_an_epoch_is_read_by_any_number_of_ranks(write_corpus, order, world):
    # Each row of the mixture occurs once in an epoch.
    one = write_corpus([10] * 200, "one")
    two = write_corpus([10] * 100, "two", first=10_000)
    three = write_corpus([10] * 50, "three", first=30_000)
    shared = {"split": "100,0,0", "order": order}
    datasets = [
        megatron("m", 3, data_path=[2, one, 1, two], **shared),
        megatron("n", 1, data_path=three, **shared),
    ]
    # 10 steps of 4; 3 of them by two ranks.
    straight, _ = rows_of(datasets, 1, 10)
    assert len({tuple(row) for row in straight}) == 40
    before, state = rows_of(datasets, 2, 3)
    after, _ = rows_of(datasets, world, 7, state)
    assert sorted(before + after) == straight
    assert after == sorted(ids_after(datasets, 3, 10))


def ids_after(datasets, first, last):
    """Rows that one rank reads from one step to another without a stop."""
    each = build(datasets, micro_batch_size=4).train
    return ids(each, last).tolist()[4 * first :]
