"""Yes/no questions: generated, read from BoolQ's files, asked in BoolQ's form."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from scores import balanced_accuracy
from vramlab.baichuan import BaichuanTokenizer
from vramlab.baichuan.tokenizer import train_tokenizer
from vramlab.factcc.base.recipe import Reading
from vramlab.factcc.base.training import _questions
from vramlab.factcc.baselines import baseline_scores
from vramlab.factcc.dataset import dataset
from vramlab.factcc.grammar import GRAMMARS, NUMBERS, QUESTIONS
from vramlab.factcc.items import DOMAINS
from vramlab.factcc.prompt import encode_document, encode_item
from vramlab.factcc.questions import QuestionConfig, generate_questions
from vramlab.factcc.sources import load_items
from vramlab.factcc.statistics import choose_threshold, summarise
from vramlab.runs.parameters import KNOWN_PARAMETERS

PARAMS = {
    **KNOWN_PARAMETERS,
    "task": "questions",
    "train_items": 30,
    "val_items": 10,
    "test_items": 20,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    items = [
        item
        for domain in ("general", "news")
        for item in generate_questions(domain, "train", 200, 0)
    ]
    words = sorted({word for item in items for word in f"{item.doc} {item.claim}".split()})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    pieces = [f"\u2581{word}" for word in words]
    return BaichuanTokenizer(
        str(train_tokenizer([*words * 20, *["yes", "no"] * 400], path, 700, pieces))
    )


def _read_back(text: str, templates: tuple[str, ...]) -> dict[str, str]:
    """The slots of a sentence that one of the templates made."""
    for template in templates:
        pattern = re.sub(r"\\{(.)\\}", r"(?P<\1>\\w+)", re.escape(template)).replace(
            r"(?P<X>\w+)", "(?P<X>not\\ |)"
        )
        if found := re.fullmatch(pattern, text, re.IGNORECASE):
            return {slot: value.lower() for slot, value in found.groupdict().items()}
    raise AssertionError(f"no template says {text!r}")


def _said(passage: str, templates: tuple[str, ...]) -> list[dict[str, str]]:
    found = []
    for sentence in re.findall(r"[^.]+\.", passage):
        try:
            found.append(_read_back(sentence.strip(), templates))
        except AssertionError:
            continue
    return found


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("shift", "records"), [("none", 2), ("moderate", 2), ("none", 9)])
def test_the_answer_is_yes_exactly_where_a_sentence_of_the_passage_says_so(domain, shift, records):
    """Read back with the templates: no record said makes a wrong question right, however many
    others there are."""
    kinds = (
        (GRAMMARS[domain].event, QUESTIONS[domain][0]),
        (GRAMMARS[domain].attitude, QUESTIONS[domain][1]),
    )
    for item in generate_questions(
        domain, "test", 60, 0, shift, QuestionConfig(records, questions=2)
    ):
        templates, questions = kinds[not re.search(rf"\b({'|'.join(NUMBERS)})\b", item.claim)]
        asked = _read_back(item.claim, questions)
        assert (asked in _said(item.doc, templates)) == bool(item.label), item
        assert len(re.findall(r" \.", item.doc)) == 2 * records


def test_a_question_alone_says_nothing_and_answers_are_balanced():
    train = generate_questions("news", "train", 2000, 0, config=QuestionConfig(4, questions=3))
    val, test = (
        generate_questions("news", split, size, 0, config=QuestionConfig(4))
        for split, size in (("val", 400), ("test", 2000))
    )
    frame, labels = (
        baseline_scores(train, val + test),
        np.array([item.label for item in val + test]),
    )
    cut = choose_threshold(labels[:400], frame["claim_only"][:400])
    assert abs(balanced_accuracy(labels[400:], frame["claim_only"][400:], cut) - 0.5) < 0.035
    assert abs(labels.mean() - 0.5) < 0.03
    kinds = Counter(item.transform for item in test)
    assert set(kinds) == {"", "entity_swap", "number_swap", "date_swap", "pronoun_swap", "negation"}


def test_questions_look_like_boolqs_and_splits_share_no_passage():
    items = [generate_questions("law", split, 200, 0) for split in ("train", "val", "test")]
    assert all(
        item.asks and item.claim[0].islower() and "?" not in item.claim
        for one in items
        for item in one
    )
    passages = [{item.doc for item in one} for one in items]
    assert not (passages[0] & passages[1] or passages[1] & passages[2] or passages[0] & passages[2])
    with pytest.raises(ValueError, match="records is 1.*use 2 or more"):
        generate_questions("law", "test", 1, 0, config=QuestionConfig(1))


def test_a_question_is_asked_in_boolqs_form(tokenizer):
    items = generate_questions("news", "train", 2, 0, config=QuestionConfig(questions=2))
    whole = encode_document(tokenizer, items, 512)
    said = "".join(
        f"\nQuestion: {item.claim}?\nAnswer:<reserved_107>{('no', 'yes')[item.label]}"
        for item in items
    )
    assert tokenizer.decode(whole.input_ids) == f"<reserved_106> {items[0].doc}{said}"
    one = encode_item(tokenizer, items[0], 512)
    span = one.spans[0]
    assert (
        one.input_ids[span.answer] == tokenizer.assistant_id
        and span.answer == len(one.input_ids) - 1
    )
    assert tokenizer.decode(one.input_ids[span.start : span.stop]) == f" {items[0].claim}"
    short = encode_document(tokenizer, items, len(whole.input_ids) - 9)
    assert (
        short.truncated
        and short.input_ids[short.spans[0].start :] == whole.input_ids[whole.spans[0].start :]
    )


def test_the_reading_base_learns_from_as_many_tokens_a_batch_whatever_the_length(tokenizer):
    batches = list(zip(range(6), _questions(tokenizer, Reading(), 6, (2, 5, 8)), strict=False))
    tokens = [int(batch["attention_mask"].sum()) for _, batch in batches]
    assert (
        max(tokens) < 1.3 * min(tokens)
        and len({batch["input_ids"].shape[0] for _, batch in batches}) == 3
    )
    answers = [
        batch["input_ids"][:, 1:][batch["input_ids"][:, :-1] == tokenizer.assistant_id]
        for _, batch in batches
    ]
    assert all(
        len(its) == 3 * batch["input_ids"].shape[0]
        for its, (_, batch) in zip(answers, batches, strict=True)
    )
    wrong = [(batch["agrees"] == 0).any(1).float().mean() for _, batch in batches]
    assert all(0.5 < share <= 1 for share in wrong)  # of three questions, seven times in eight


def test_a_data_set_of_questions_has_its_shifts_and_only_the_domains_asked_for():
    made = dataset({**PARAMS, "test_domains": "news, law", "records": 3})
    assert [len(part) for part in (made.train, made.val, made.test)] == [30, 10, 80]
    assert Counter((item.domain, item.shift) for item in made.test) == {
        ("news", "none"): 20,
        ("news", "mild"): 20,
        ("news", "moderate"): 20,
        ("law", "severe"): 20,
    }
    assert (
        len({item.group for item in made.train}) == 10
        and len({item.group for item in made.test}) == 80
    )
    for wrong, words in (
        ({"task": "riddles"}, "makes claims, questions"),
        ({"test_domains": "sports"}, "test_domains has sports: there are general"),
        ({"task": "claims", "records": 4}, "use 2 to 3 for claims of news at shift mild"),
    ):
        with pytest.raises(ValueError, match=words):
            dataset({**PARAMS, **wrong})


def _boolq(folder, superglue: bool):
    """400 training and 50 validation lines, 4 of 5 to be answered with yes, of 200 passages."""
    folder.mkdir()
    for split, size in (("train", 400), ("val" if superglue else "dev", 50)):
        rows = [
            {
                "question": f"is number {i} odd",
                "passage": f"Of {split} {i // 2}.",
                **(
                    {"idx": i, "label": i % 5 > 0}
                    if superglue
                    else {"title": "x", "answer": i % 5 > 0}
                ),
            }
            for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if superglue:
        (folder / "test.jsonl").write_text(
            json.dumps({"question": "is it", "passage": "Hidden.", "idx": 0}) + "\n"
        )
    return folder


@pytest.mark.parametrize("superglue", [False, True])
def test_boolq_is_scored_on_its_validation_split_by_accuracy_beside_the_majority(
    tmp_path, superglue
):
    path = _boolq(tmp_path / "BoolQ", superglue)
    made = dataset({**PARAMS, "task": "claims", "items": str(path), "train_domain": "boolq"})
    assert len(made.test) == 50 and {item.doc.split()[1] for item in made.test} == {
        "val" if superglue else "dev"
    }
    assert (
        len(made.train) + len(made.val) == 400
        and 20 < len(made.val) < 60
        and made.test[0].claim == "is number 0 odd"
    )
    assert not {item.group for item in made.train} & {item.group for item in made.val}
    items = made.val + made.test
    frame = baseline_scores(made.train, items).assign(
        yesno=[1.0 if i % 4 else -1.0 for i in range(len(items))],
        **{
            name: [getattr(item, name) for item in items]
            for name in ("domain", "split", "shift", "group", "label")
        },
    )
    rows = summarise(frame).query("metric == 'accuracy'").set_index("scoring")
    assert rows.loc["majority", "value"] == 0.8 and rows.loc["majority", "low"] == pytest.approx(
        0.8
    )
    hand = np.mean(
        [(i % 4 > 0) == item.label for i, item in enumerate(items) if item.split == "test"]
    )
    assert (
        rows.loc["yesno", "value"] == hand
        and rows.loc["yesno", "low"] < hand < rows.loc["yesno", "high"]
    )


def test_claims_are_no_questions(tmp_path):
    path = tmp_path / "news.jsonl"
    path.write_text(json.dumps({"doc": "d", "summary": "s", "label": 1, "edit_types": []}) + "\n")
    assert not load_items(path).items[0].asks
    with pytest.raises(ValueError, match="news.jsonl has claims: leave task out"):
        dataset({**PARAMS, "items": str(path)})
