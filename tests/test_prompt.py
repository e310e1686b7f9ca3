"""Sequences, batches and lessons by value, with a tokenizer of one piece a word."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from vramlab.factcc.base import curriculum as lessons
from vramlab.factcc.items import Item
from vramlab.factcc.prompt import (
    Span,
    answer_ids,
    batch_encoded,
    check_items,
    check_room,
    encode_document,
    encode_item,
    encode_prompt,
    sequences,
    training_batches,
)

NO, YES, USER, ASSISTANT, LEFT_OUT = 300, 301, 195, 196, -100


class Words:
    """Each word is a piece, numbered as it comes: no and yes first."""

    user_id, assistant_id = USER, ASSISTANT

    def __init__(self):
        self.ids = {"no": NO, "yes": YES}
        self.sp = SimpleNamespace(
            id_to_piece=lambda at: "\N{LOWER ONE EIGHTH BLOCK}" + list(self.ids)[at - NO]
        )

    def encode_text(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, NO + len(self.ids)) for word in text.split()]


def item(
    claim: str = "a b", label: int = 1, doc: str = "d1 d2 d3 d4", source: str = "generated", **more
) -> Item:
    return Item(
        **{
            "uid": claim,
            "source": source,
            "domain": "news",
            "split": "train",
            "doc": doc,
            "claim": claim,
            "label": label,
            "transform": "",
            "shift": "none",
            "group": doc,
            **more,
        }
    )


@pytest.mark.parametrize(
    ("max_length", "document"),
    [(10, "d1 d2 d3 d4"), (11, "d1 d2 d3 d4"), (9, "d1 d2 d3"), (7, "d1")],
)
def test_a_document_loses_its_end_and_never_the_claim(max_length, document):
    words = Words()
    found = encode_document(words, [item()], max_length)
    kept = len(document.split())
    assert found.input_ids == [USER, *words.encode_text(f"{document} Claim: a b"), ASSISTANT, YES]
    assert found.spans == (Span(kept + 2, kept + 4, kept + 4, 1),)
    assert found.truncated == (kept < 4)
    assert encode_item(words, item(), max_length).input_ids == found.input_ids[:-1]


def test_claims_follow_each_other_and_a_question_has_words_behind_it():
    words = Words()
    found = encode_document(words, [item(), item("c", 0)], 30)
    assert found.input_ids[5:] == [
        *words.encode_text("Claim: a b"),
        ASSISTANT,
        YES,
        *words.encode_text("Claim: c"),
        ASSISTANT,
        NO,
    ]
    assert found.spans == (Span(6, 8, 8, 1), Span(11, 12, 12, 0))
    asked = encode_document(words, [item(source="boolq")], 30)
    assert asked.input_ids[5:] == [*words.encode_text("Question: a b ? Answer:"), ASSISTANT, YES]
    assert asked.spans == (Span(6, 8, 10, 1),)


def test_what_leaves_no_room_says_how_much_is_enough():
    with pytest.raises(
        ValueError,
        match=r"item a b: its 1 claims leave .* max_length 6: raise max_length to 70 or more",
    ):
        encode_document(Words(), [item()], 6)
    with pytest.raises(ValueError, match="its 1 questions leave"):
        check_room(Words(), [[item()], [item(source="boolq")]], 8)
    check_room(Words(), [[item(doc="long " * 99)]], 7)
    ids, lost = encode_prompt(Words(), item(), 8, 4)
    assert (len(ids), lost) == (4, True) and encode_prompt(Words(), item(), 10, 4)[1] is False
    with pytest.raises(
        ValueError,
        match="max_length is 6: .* takes 4 tokens and its lead 1, raise max_length to 69 or more",
    ):
        encode_prompt(Words(), item(), 6, 4)
    assert len(encode_prompt(Words(), item(), 7, 4)[0]) == 3


def test_answers_have_to_begin_with_pieces_of_their_own():
    assert answer_ids(Words()) == (NO, YES)
    with pytest.raises(ValueError, match="same first piece 7"):
        answer_ids(SimpleNamespace(encode_text=lambda text: [7]))


def test_what_is_learned_by_objective():
    words = Words()
    true, false = (
        encode_document(words, [item(label=label, doc=doc)], 30)
        for label, doc in ((1, "d1"), (0, "d1 d2 d3"))
    )
    scored = encode_item(words, item(doc="d1"), 30)
    found = {
        name: batch_encoded([true, false, scored], name)
        for name in ("answer", "answer+claim", "lm")
    }
    ids = torch.tensor([true.input_ids + [0, 0], false.input_ids, scored.input_ids + [0, 0, 0]])
    for batch in found.values():
        assert torch.equal(batch["input_ids"], ids) and batch["attention_mask"].sum(1).tolist() == [
            7,
            9,
            6,
        ]
        assert batch["attention_mask"][0].tolist() == [1] * 7 + [0, 0]
    x, claim = LEFT_OUT, words.encode_text("a b")
    assert found["answer"]["labels"].tolist() == [[x] * 6 + [YES, x, x], [x] * 8 + [NO], [x] * 9]
    assert found["answer+claim"]["labels"].tolist() == [
        [x] * 3 + claim + [x, YES, x, x],
        [x] * 8 + [NO],
        [x] * 3 + claim + [x] * 4,
    ]
    assert (
        found["lm"]["labels"].tolist() == ids.where(found["lm"]["attention_mask"] == 1, x).tolist()
    )
    with pytest.raises(ValueError, match="objective is 'all': use one of answer, answer"):
        batch_encoded([true], "all")


def test_items_of_one_document_come_together_four_at_most():
    items = [
        item(f"c{at}", doc=doc)
        for doc, count in (("x", 9), ("y", 4), ("z", 1))
        for at in range(count)
    ]
    found = sequences(items, random.Random(0))
    assert sorted(map(len, found)) == [1, 1, 4, 4, 4] and all(
        len({each.doc for each in group}) == 1 for group in found
    )
    assert sorted(each.uid + each.doc for group in found for each in group) == sorted(
        each.uid + each.doc for each in items
    )
    check_items(items, 5)
    check_items(items, 10, 2)
    with pytest.raises(
        ValueError,
        match=(
            "batch_size is 6, and the 14 items to train on make 5 sequences: use a batch_size of 5 "
        ),
    ):
        check_items(items, 6)
    with pytest.raises(ValueError, match="a batch_size of 10 at most"):
        check_items(items, 11, 2)


@pytest.mark.parametrize(
    ("documents", "sizes"),
    [(6, [4, 2, 4, 2]), (5, [4, 4, 4, 4]), (2, [2, 2, 2, 2]), (8, [4, 4, 4, 4])],
)
def test_half_a_batch_is_enough_at_the_end_of_an_epoch_and_less_is_not(documents, sizes):
    batches = training_batches(Words(), [item(doc=f"d{at}") for at in range(documents)], 4, 30, 0)
    assert [len(next(batches)["input_ids"]) for _ in sizes] == sizes


# lessons ------------------------------------------------------------------------------------------


def periods(batch: dict, after: int) -> list[int]:
    """Of each row the period that its labels tell; what is learned is what the period says."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        begins = int((labels != LEFT_OUT).nonzero()[0])
        assert torch.equal(labels[begins:], ids[begins:])
        found.append(begins - after)
        assert torch.equal(ids[found[-1] :], ids[: -found[-1]])
    return found


def test_copies_have_every_period_from_3_to_16_and_distinct_words_in_it():
    batch = next(lessons.copies(torch.arange(50, 90), 400, 0))
    found = periods(batch, 1)
    assert batch["input_ids"].shape == (400, 40) and set(found) == {*range(3, 17)}
    assert all(
        len(set(row[:period].tolist())) == period
        for row, period in zip(batch["input_ids"], found, strict=True)
    )


def test_echoes_have_every_period_from_8_to_30_and_at_most_three_quarters_as_many_words():
    batch = next(lessons.echoes(torch.arange(50, 90), 800, 0))
    found = periods(batch, 3)
    kinds = [len(set(row.tolist())) for row in batch["input_ids"]]
    assert batch["input_ids"].shape == (800, 64) and set(found) == {*range(8, 31)}
    assert all(count <= max(3, 0.75 * period) for count, period in zip(kinds, found, strict=True))
    assert (
        max(count / period for count, period in zip(kinds, found, strict=True)) > 0.6
        and min(kinds) <= 3
    )


def test_a_claim_agrees_until_its_first_wrong_word():
    words = Words()
    claims = [item("aa bb cc", 1), item("aa bb cc", 0, wrong_until=5), item("aa bb cc", 0)]
    encoded, row = encode_document(words, claims, 60), torch.full((40,), torch.nan)
    lessons._mark(row, words, encoded, claims)
    said = [row[span.start : span.stop].tolist() for span in encoded.spans]
    assert (
        said[:2] == [[1, 1, 1], [1, 0, 0]] and torch.isnan(row).sum() == 40 - 6
    )  # "aa bb" ends at character 5


def test_every_batch_of_checked_claims_is_full_and_marks_only_claims():
    batches = lessons.checked_batches(Words(), [item(doc=f"d{at}") for at in range(5)], 2, 0)
    for _ in range(4):
        batch = next(batches)
        assert len(batch["input_ids"]) == 2 and (batch["agrees"] == 1).sum(1).tolist() == [2, 2]
        assert torch.isnan(batch["agrees"]).sum() == batch["agrees"].numel() - 4
