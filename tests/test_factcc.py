"""FactCC items: what the generator promises, what the sources read, what the statistics say."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scores import auc, balanced_accuracy
from vramlab.cli import main
from vramlab.factcc import sources
from vramlab.factcc.baselines import baseline_scores
from vramlab.factcc.formats import story_text
from vramlab.factcc.generator import GeneratorConfig, generate_items
from vramlab.factcc.grammar import GRAMMARS, HELD_OUT_NAMES, HELD_OUT_PLACES
from vramlab.factcc.items import DOMAINS, Item
from vramlab.factcc.sources import describe_items, load_items, write_items
from vramlab.factcc.statistics import (
    choose_threshold,
    compare,
    holm,
    mcnemar_exact,
    resample,
    summarise,
)

SUMMEDITS = Path(__file__).parents[2] / "shared" / "data" / "summedits" / "news.jsonl.gz"


# the generator ------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_claim_alone_says_nothing_and_overlap_does_not_solve_it(domain):
    train = generate_items(domain, "train", 4000, 0, config=GeneratorConfig(claims=4))
    val, test = generate_items(domain, "val", 500, 0), generate_items(domain, "test", 2000, 0)
    frame = baseline_scores(train, val + test)
    labels = np.array([item.label for item in val + test])
    reached = {
        name: balanced_accuracy(
            labels[500:], frame[name][500:], choose_threshold(labels[:500], frame[name][:500])
        )
        for name in ("claim_only", "unigram_overlap", "bigram_overlap", "majority")
    }
    assert abs(reached["claim_only"] - 0.5) < 0.04 and reached["majority"] == 0.5
    assert 0.55 < reached["unigram_overlap"] < reached["bigram_overlap"] < 0.80


def test_labels_are_balanced_overall_and_within_each_transformation_of_the_same_slot():
    items = generate_items("news", "train", 4000, 0, config=GeneratorConfig(noise=0))
    assert abs(np.mean([item.label for item in items]) - 0.5) < 0.03
    kinds = Counter(item.transform for item in items)
    assert {
        "verbatim",
        "paraphrase",
        "entity_swap",
        "number_swap",
        "date_swap",
        "pronoun_swap",
        "negation",
    } == set(kinds)
    assert kinds["entity_swap"] > kinds["number_swap"] > 250


def test_negation_goes_both_ways_and_noise_falls_on_both_labels():
    items = generate_items("law", "train", 4000, 0, config=GeneratorConfig(paraphrase=0, noise=0))
    negated = [item for item in items if item.transform == "negation"]
    added = np.mean([" not " in item.claim for item in negated])
    assert 0.4 < added < 0.6
    items = generate_items("law", "train", 4000, 0, config=GeneratorConfig(noise=0.5))
    noisy = [item for item in items if "+noise" in item.transform]
    assert abs(np.mean([item.label for item in noisy]) - 0.5) < 0.05


def test_the_same_arguments_give_the_same_items_and_splits_share_no_document():
    assert generate_items("news", "test", 50, 3) == generate_items("news", "test", 50, 3)
    documents = [
        {item.doc for item in generate_items("news", split, 400, 3)}
        for split in ("train", "val", "test")
    ]
    assert all(not one & other for one, other in pairwise([*documents, documents[0]]))


@pytest.mark.parametrize("domain", DOMAINS)
def test_shifted_items_use_only_what_training_never_saw(domain):
    grammar = GRAMMARS[domain]
    seen = " ".join(item.doc + item.claim for item in generate_items(domain, "train", 500, 0))
    held = (*grammar.names[-HELD_OUT_NAMES:], *grammar.places[-HELD_OUT_PLACES:])
    assert not any(f" {word} " in seen for word in held)
    for shift in ("mild", "moderate"):
        text = " ".join(item.doc for item in generate_items(domain, "test", 50, 0, shift))
        assert not any(f" {name} " in text for name in grammar.names[:-HELD_OUT_NAMES])
    moved = generate_items(domain, "test", 200, 0, "moderate", GeneratorConfig(noise=0))
    assert not any(item.claim in item.doc for item in moved if item.label)


def test_the_character_where_a_claim_goes_wrong_is_known():
    for item in generate_items(
        "general", "train", 200, 0, config=GeneratorConfig(paraphrase=0, noise=0, extrinsic=1)
    ):
        if item.label:
            assert item.wrong_until is None and item.claim in item.doc
        elif (
            item.transform == "date_swap"
        ):  # not in the document, so the first word that leaves it is the wrong one
            before, _, wrong = item.claim[: item.wrong_until].rpartition(" ")
            assert before in item.doc and wrong not in item.doc and wrong.endswith("day")


@pytest.mark.parametrize(
    "bad",
    [
        ("sports", "test", 1, 0, "none"),
        ("news", "dev", 1, 0, "none"),
        ("news", "test", 1, 0, "severe"),
    ],
)
def test_an_unknown_domain_split_or_shift_is_named(bad):
    with pytest.raises(ValueError, match="the generator has"):
        generate_items(*bad)


# the sources --------------------------------------------------------------------------------------


def _lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def test_a_released_factcc_directory_finds_its_articles_and_counts_the_missing(tmp_path):
    rows = [
        {
            "id": "1",
            "claim": "A cat sat.",
            "label": "CORRECT",
            "filepath": "cnndm/cnn/stories/aa.story",
        },
        {
            "id": "2",
            "claim": "A dog sat.",
            "label": "INCORRECT",
            "filepath": "cnndm/cnn/stories/aa.story",
        },
        {"id": "3", "claim": "Gone.", "label": "CORRECT", "filepath": "cnndm/cnn/stories/bb.story"},
    ]
    _lines(tmp_path / "factcc" / "unpaired_annotated_data" / "test" / "data-dev.jsonl", rows)
    _lines(tmp_path / "factcc" / "unpaired_annotated_data" / "val" / "data-dev.jsonl", rows[:1])
    story = tmp_path / "stories" / "cnn" / "stories" / "aa.story"
    story.parent.mkdir(parents=True)
    story.write_text("A cat sat.\n\n It purred. \n\n@highlight\n\nNot this")
    described = describe_items(tmp_path / "factcc", stories=tmp_path / "stories")
    assert (
        described["source"] == "factcc"
        and described["items"] == 3
        and described["splits"] == {"test": 2, "val": 1}
    )
    assert described["missing_articles"] == 1 and any(
        "bb.story" in p["message"] for p in described["problems"]
    )
    assert any("503 items, 441 consistent" in p["message"] for p in described["problems"])
    item = load_items(tmp_path / "factcc", stories=tmp_path / "stories").items[0]
    assert item.doc == "A cat sat. It purred." and item.group.endswith("aa.story")
    without = describe_items(tmp_path / "factcc")
    assert without["items"] == 0 and "--stories" in without["problems"][0]["message"]


def test_a_paired_factcc_copy_needs_no_stories(tmp_path):
    _lines(
        tmp_path / "annotated_data" / "validation" / "data-dev.jsonl",
        [
            {
                "id": 1,
                "text": "It rained.",
                "claim": "It rained.",
                "label": "CORRECT",
                "filepath": "x",
            }
        ],
    )
    loaded = load_items(tmp_path)
    assert [item.split for item in loaded.items] == ["val"] and loaded.items[0].label == 1


def test_a_story_ends_at_its_first_highlight():
    assert story_text("One.\n\nTwo.\n@highlight\nThree") == "One. Two."


def test_both_boolq_forms_are_read_and_hidden_labels_are_counted(tmp_path):
    original = _lines(
        tmp_path / "original" / "dev.jsonl",
        [{"question": "is it wet", "title": "Rain", "answer": True, "passage": "Rain is wet."}],
    )
    superglue = _lines(
        tmp_path / "superglue" / "test.jsonl",
        [
            {"question": "is it dry", "passage": "Rain is wet.", "idx": 0},
            {"question": "is it dry", "passage": "Rain is wet.", "idx": 1, "label": False},
        ],
    )
    first = load_items(original).items[0]
    assert (first.label, first.claim, first.split) == (1, "is it wet", "val")
    described = describe_items(superglue)
    assert described["items"] == 1 and described["unlabelled"] == 1 and described["majority"] == 1.0


def test_every_bad_line_is_reported_by_number_and_none_is_dropped_silently(tmp_path):
    good = {"doc": "d", "summary": "s", "label": 1, "edit_types": [], "id": "a"}
    path = _lines(
        tmp_path / "news.jsonl",
        [
            good,
            "{broken",
            "[1]",
            {**good, "label": "maybe"},
            {**good, "summary": ""},
            {**good, "id": "b"},
        ],
    )
    described = describe_items(path)
    assert described["items"] == 2 and [p["line"] for p in described["problems"]] == [2, 3, 4, 5]
    assert "'maybe'" in described["problems"][2]["message"]


def test_a_truncated_archive_gives_what_could_be_read_and_says_where_it_ends(tmp_path):
    whole = gzip.compress(
        "".join(
            json.dumps({"doc": f"d{i}", "summary": "s" * 50, "label": 1, "edit_types": []}) + "\n"
            for i in range(5000)
        ).encode()
    )
    (tmp_path / "news.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    described = describe_items(tmp_path / "news.jsonl.gz")
    assert (
        0 < described["items"] < 5000
        and "cannot be read on" in described["problems"][-1]["message"]
    )


def test_what_is_not_a_data_set_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_items(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no .jsonl"):
        load_items(tmp_path)
    with pytest.raises(ValueError, match="--source"):
        load_items(_lines(tmp_path / "x.jsonl", [{"a": 1}]))


def test_generated_items_survive_the_disk(tmp_path):
    items = generate_items("news", "train", 20, 0)
    write_items(items, tmp_path / "items.jsonl")
    assert [asdict(item) for item in load_items(tmp_path / "items.jsonl").items] == [
        asdict(item) for item in items
    ]


@pytest.mark.skipif(
    not SUMMEDITS.exists(),
    reason="SummEdits is not at ../shared/data/summedits (it is not part of the project)",
)
def test_summedits_news_has_819_items_25_documents_321_consistent(capsys):
    assert main(["items", str(SUMMEDITS), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["items"], described["documents"], described["consistent"]) == (819, 25, 321)
    loaded = load_items(SUMMEDITS).items
    of_group = {
        item.group: {other.split for other in loaded if other.group == item.group}
        for item in loaded
    }
    assert all(len(splits) == 1 for splits in of_group.values())


# the statistics -----------------------------------------------------------------------------------


def test_balanced_accuracy_and_auc_of_known_cases():
    labels, scores = [1, 1, 1, 0, 0], [0.9, 0.8, 0.2, 0.7, 0.1]
    assert balanced_accuracy(labels, scores, 0.5) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert auc(labels, scores) == pytest.approx(5 / 6)
    assert (
        auc([1, 0], [1.0, 1.0]) == 0.5
        and balanced_accuracy([1] * 441 + [0] * 62, [1] * 503, 0) == 0.5
    )


def test_the_threshold_is_the_best_cut_of_all():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = labels + rng.normal(0, 1, 200)
    cut = choose_threshold(labels, scores)
    best = max(balanced_accuracy(labels, scores, t) for t in scores)
    assert balanced_accuracy(labels, scores, cut) == pytest.approx(best)


def test_resampling_keeps_documents_whole_and_labels_in_number():
    groups, labels = ["a", "a", "b", "c", "d"], [1, 0, 1, 0, 0]
    weights = resample(groups, labels, count=500)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [3, 4]].sum(1) == 2).all() and (weights[:, 2] == 1).all()


def _frame(labels, scores, split="test", name="x"):
    import pandas as pd

    n = len(labels)
    return pd.DataFrame(
        {
            "uid": [f"{split}{i}" for i in range(n)],
            "domain": name,
            "split": split,
            "shift": "none",
            "group": [f"{split}{i}" for i in range(n)],
            "transform": "",
            "label": labels,
            "truncated": False,
            "yesno": scores,
            "likelihood": scores,
            "n_tokens": 1,
        }
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    """A scorer whose balanced accuracy is known: 95 % intervals hold it in about 95 % of data
    sets."""
    import pandas as pd

    rng, held = np.random.default_rng(1), 0
    val = _frame([0, 1] * 10, [-1.0, 1.0] * 10, "val")
    for _ in range(60):
        labels = np.repeat([0, 1], 100)
        right = rng.random(200) < 0.75
        scores = np.where(right == (labels == 1), 1.0, -1.0)
        rows = summarise(pd.concat([val, _frame(labels, scores)])).query(
            "scoring == 'yesno' and metric == 'balanced_accuracy'"
        )
        row = rows.iloc[0]
        held += row["low"] <= 0.75 <= row["high"]
    assert 52 <= held <= 60


def test_a_run_compared_with_itself_does_not_differ_and_other_items_are_refused():
    import pandas as pd

    frame = pd.concat(
        [_frame([0, 1] * 10, np.arange(20.0), "val"), _frame([0, 1] * 20, np.arange(40.0) % 7)]
    )
    same = compare(frame, frame)
    assert (same["difference"] == 0).all() and (same["mcnemar_p"] == 1).all()
    with pytest.raises(ValueError, match="same items"):
        compare(frame, frame.iloc[:-1])


def test_mcnemar_and_holm_of_known_cases():
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32) and mcnemar_exact(
        3, 3
    ) == 1.0 == mcnemar_exact(0, 0)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_an_item_is_plain_data():
    assert Item(**asdict(generate_items("news", "test", 1, 0)[0])).domain == "news"


def test_a_copy_of_factcc_of_other_size_or_balance_is_said_and_a_split_that_is_not_there_is_not():
    def items(split, consistent, wrong):
        return [
            SimpleNamespace(split=split, label=label) for label in [1] * consistent + [0] * wrong
        ]

    assert sources._unexpected(items("test", 441, 62) + items("val", 400, 531), set()) == []
    assert sources._unexpected(items("val", 931, 0), set()) == [], "no balance of it is published"
    (one,) = sources._unexpected(items("test", 440, 63) + items("val", 400, 531), set())
    assert (one.line, one.path) == (0, "test") and one.message.startswith(
        "503 items, 440 consistent: the annotated release"
    )
    (one,) = sources._unexpected(items("val", 3, 2) + items("test", 441, 62), {"a", "b"})
    assert (
        one.message
        == "5 items, 3 consistent: the annotated release has 931 items; 2 articles are missing"
    )
