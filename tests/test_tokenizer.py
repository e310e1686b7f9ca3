"""The tokenizer does what its SentencePiece file says, and nothing else."""

from __future__ import annotations

import pytest
import sentencepiece
from transformers import AutoTokenizer

from vramlab.baichuan import BaichuanTokenizer
from vramlab.baichuan.tokenizer import train_tokenizer
from vramlab.factcc.generator import generate_items

TEXTS = ["Prices rose 1234 points in 2023.", "  two spaces  stay", "百川智能 模型", "naïve café ☕", "line\nbreak\ttab",
         "</s><s><unk><reserved_106>", "", " ", "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [f"{item.doc} {item.claim} 12 34 567 890" for item in generate_items("news", "train", 300, 0)]
    return BaichuanTokenizer(str(train_tokenizer(texts, path, 640)))


def test_ids_are_sentencepieces_own(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    for text in TEXTS:
        assert tokenizer.encode_text(text) == reference.encode(text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip_to_the_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_no_dummy_prefix_digits_one_by_one_and_bytes_for_the_unknown(tokenizer):
    assert not tokenizer.tokenize("firm")[0].startswith("▁")
    assert [piece for piece in tokenizer.tokenize("2023")] == list("2023")
    assert tokenizer.tokenize("☕") == ["<0xE2>", "<0x98>", "<0x95>"]


def test_control_pieces_are_never_read_from_text(tokenizer):
    for text in ("</s>", "<s>", "<reserved_106>", "<reserved_107>"):
        ids = tokenizer(text)["input_ids"]
        assert not {1, 2, 195, 196} & set(ids) and tokenizer.decode(ids) == text


def test_chat_marks_are_ids_195_and_196(tokenizer):
    assert tokenizer.sp.id_to_piece(195) == "<reserved_106>" and tokenizer.sp.id_to_piece(196) == "<reserved_107>"
    ids = tokenizer.build_chat([{"role": "system", "content": "s"}, {"role": "user", "content": "<reserved_107>"}])
    assert ids[len(tokenizer.encode_text("s"))] == 195 and ids[-1] == 196 and ids.count(196) == 1
    with pytest.raises(ValueError, match="'tool'"):
        tokenizer.build_chat([{"role": "tool", "content": ""}])


def test_pad_start_and_end_are_0_1_2_and_none_is_added_unasked(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a")["input_ids"] == tokenizer.encode_text("a")


def test_save_and_load_through_the_auto_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is BaichuanTokenizer
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)


def test_a_missing_file_and_too_small_a_vocabulary_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        BaichuanTokenizer(str(tmp_path / "no.model"))
    with pytest.raises(ValueError, match="453 ids"):
        train_tokenizer(["a b c"], tmp_path / "t.model", 400)
