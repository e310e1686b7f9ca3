"""What a model writes: the generator's grammar reads it back, a published checker is asked about
it, and both are counted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import micro
import released
from vramlab.factcc.checker import Checker, consistent_id
from vramlab.factcc.generator import GeneratorConfig, generate_items
from vramlab.factcc.grammar_judge import verdict
from vramlab.factcc.items import DOMAINS, Item
from vramlab.factcc.statistics import wilson
from vramlab.factcc.written_claims import _greedy, documents, first_sentence, judge, shares
from vramlab.report import tables
from vramlab.report.takeaways import written

DOC = (
    "Korv hired five clerks at its Arlen plant Monday . The chief of Balm told reporters they will"
    " resign . Two cooks joined Balm at the Brock plant Friday . He will not resign , the chief of"
    " Korv told reporters ."
)


def _item(doc: str = DOC, domain: str = "news", uid: str = "a", shift: str = "none") -> Item:
    return Item(uid, "generated", domain, "test", doc, "x", 1, "", shift, uid)


# the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "wanted"),
    [
        ("Korv hired five clerks at its Arlen plant Monday .", "consistent"),
        ("Five clerks joined Korv at the Arlen plant Monday .", "consistent"),
        ("Asked about Korv the chief said he will not resign .", "consistent"),
        ("Five clerks joined Korv at the Brock plant Monday .", "inconsistent"),
        ("Asked about Korv the chief said he will resign .", "inconsistent"),
        ("They will resign , the chief of Korv told reporters .", "inconsistent"),
        ("Five cooks joined Korv at the Arlen plant Monday .", "inconsistent"),
        ("Five clerks joined Korv at the Arlen Monday .", "unparsable"),
        ("Five clerks joined Korv at the Arlen plant Monday . He", "unparsable"),
        ("Five clerks joined Paris at the Arlen plant Monday .", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_a_claim_is_read_back_and_held_against_its_document(claim, wanted):
    assert verdict(_item(), claim) == wanted


def test_a_document_of_other_making_has_no_oracle():
    assert verdict(_item("The council met on Monday. It rained."), "It rained.") is None
    assert verdict(_item(domain="earnings"), "It rained.") is None


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_oracle_agrees_with_the_generator_on_every_claim_without_noise(domain):
    items = [
        item
        for shift in ("none", "moderate")
        for item in generate_items(domain, "test", 400, 0, shift, GeneratorConfig(noise=0))
    ]
    found = [verdict(item, item.claim) for item in items]
    assert found == ["consistent" if item.label else "inconsistent" for item in items]


# writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        (" Korv hired five clerks . The firm", "Korv hired five clerks ."),
        (" Korv hired five clerks .", None),
        (
            " He met Mr. Smith in the U.S. on Monday. Then",
            "He met Mr. Smith in the U.S. on Monday.",
        ),
        (" It cost $3.50 a share. He", "It cost $3.50 a share."),
        (' "Go!" he said.\nClaim:', '"Go!" he said.'),
        ("\n It ended", None),
    ],
)
def test_the_claim_is_the_first_sentence(text, claim):
    assert first_sentence(text) == claim


@pytest.mark.parametrize(
    "row",
    [{}, {"trains": {"prompt": {"tokens": 3}}}, {"trains": {"prefix": {"tokens": 3}}}],
    ids=["all", "prompt", "prefix"],
)
def test_cached_writing_of_padded_rows_equals_each_row_alone_run_whole_again(row):
    model = micro.train(row, steps=2)[2].finish()
    prompts = [list(range(5, 14)), list(range(20, 25))]
    greedy = _greedy(model, prompts, pad=0)
    with torch.no_grad():
        together = [next(greedy) for _ in range(4)]
        for at, ids in enumerate(prompts):
            for step in range(4):
                logits = model(
                    input_ids=torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    use_cache=False,
                ).logits
                ids = [*ids, int(logits[0, -1].argmax())]
                assert together[step][at] == ids[-1]


def test_each_document_is_written_about_once_and_as_many_of_every_domain_and_shift():
    items = [_item(uid=uid, domain=domain) for domain in ("news", "law") for uid in "aabbc"]
    assert [(item.domain, item.uid) for item in documents(items, 2)] == [
        ("news", "a"),
        ("news", "b"),
        ("law", "a"),
        ("law", "b"),
    ]


# counting -----------------------------------------------------------------------------------------


def test_shares_are_counts_over_what_was_judged_with_wilsons_interval():
    frame = pd.DataFrame(
        {"domain": "news", "shift": "none", "oracle": ["consistent"] * 8 + ["unparsable"] * 2}
    )
    rows = {row["call"]: row for row in shares(frame)}
    assert {call: row["count"] for call, row in rows.items()} == {
        "consistent": 8,
        "inconsistent": 0,
        "unparsable": 2,
    }
    assert (rows["consistent"]["low"], rows["consistent"]["high"]) == pytest.approx(
        (0.4902, 0.9433), abs=1e-4
    )  # Wilson 1927
    assert rows["inconsistent"]["low"] == 0 and wilson(7, 7)[1] == 1 and math.isnan(wilson(0, 0)[0])
    assert shares(frame.assign(oracle=None)) == []


def test_the_report_has_a_line_for_each_regime_judge_and_place():
    frame = pd.DataFrame(
        {"domain": "law", "shift": "severe", "oracle": ["consistent", "unparsable"]}
    )
    run = SimpleNamespace(
        name="lomo",
        params={"train_domain": "news"},
        result={"generation": {"shares": shares(frame)}},
    )
    silent = SimpleNamespace(name="full", params={"train_domain": "news"}, result={})
    (row,) = tables.written([silent, run]).to_dict("records")
    assert (row["regime"], row["place"], row["consistent"], row["inconsistent"], row["n"]) == (
        "lomo",
        "law",
        0.5,
        0.0,
        2,
    )
    assert (row["low"], row["high"]) == wilson(1, 2) and tables.written([silent]).empty
    assert written(run) == [
        "Of 2 claims it wrote in law (severe), the grammar that made the document finds 50.0%"
        " [9.5%, 90.5%] consistent."
    ]


# the checker --------------------------------------------------------------------------------------

WORDS = sorted({word.lower() for word in DOC.split()})
CLAIMS = [
    "Korv hired five clerks .",
    "The chief of Balm told reporters they will resign .",
    "Two cooks joined Balm .",
    "",
]


def _judged(folder, labels):
    checker = Checker.load(released.checker(folder, labels, WORDS))
    frame = pd.DataFrame({"domain": "news", "shift": "none", "claim": CLAIMS})
    return checker, judge(frame, [_item()] * len(CLAIMS), checker)


def test_the_order_of_id2label_decides_what_is_called_consistent(tmp_path):
    checker, one = _judged(tmp_path / "one", ["CORRECT", "INCORRECT"])
    other = _judged(tmp_path / "other", ["Inconsistent", "Consistent"])[1]
    assert checker.consistent == 0 and list(one["checker"][3:]) == ["unreadable"] == list(
        other["checker"][3:]
    )
    flipped = {"consistent": "inconsistent", "inconsistent": "consistent"}
    assert [flipped[call] for call in one["checker"][:3]] == list(other["checker"][:3])
    assert set(one["checker"][:3]) == {
        "consistent",
        "inconsistent",
    }  # so that a share that stayed would show
    torch.testing.assert_close(
        torch.tensor(one["checker_probability"][:3]),
        1 - torch.tensor(other["checker_probability"][:3]),
    )


def test_of_a_pair_that_is_too_long_the_document_loses_its_end(tmp_path):
    checker, frame = _judged(tmp_path / "one", ["CORRECT", "INCORRECT"])
    words = DOC.split()
    assert list(frame["checker_cut"]) == [
        len(words) + len(claim.split()) + 3 > 48 for claim in CLAIMS
    ]
    longer = checker.judge([DOC + " Korv" * 90], CLAIMS[:1])
    fitting = " ".join((DOC + " Korv" * 90).split()[: 48 - 3 - len(CLAIMS[0].split())])
    assert longer["cut"][0] and longer["probability"][0] == pytest.approx(
        checker.judge([fitting], CLAIMS[:1])["probability"][0]
    )
    assert list(checker.judge([DOC], ["Korv " * 25])["called"]) == ["unreadable"]


@pytest.mark.parametrize(
    "labels",
    [
        ["LABEL_0", "LABEL_1"],
        ["CORRECT", "CONSISTENT"],
        ["CORRECT", "NEUTRAL", "INCORRECT"],
        ["INCORRECT", "INCONSISTENT"],
    ],
)
def test_labels_that_do_not_tell_are_refused_by_name(labels):
    with pytest.raises(ValueError, match=rf"{labels[0]}, {labels[1]}.*id2label"):
        consistent_id(dict(enumerate(labels)), "x")


def test_a_folder_that_cannot_judge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        Checker.load(tmp_path)
    folder = released.checker(tmp_path / "headless", ["CORRECT", "INCORRECT"], WORDS)
    from safetensors.torch import load_file, save_file

    kept = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "classifier" not in name
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="classifier.weight.*random"):
        Checker.load(folder)
