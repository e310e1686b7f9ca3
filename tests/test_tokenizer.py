"""The tokenizer does what its SentencePiece file says, and nothing else."""

from __future__ import annotations

import pytest
import sentencepiece
from transformers import AutoTokenizer

from vramlab.baichuan import BaichuanTokenizer
from vramlab.baichuan.tokenizer import RESERVED, train_tokenizer
from vramlab.factcc.generator import generate_items

TEXTS = [
    "Prices rose 1234 points in 2023.",
    "  two spaces  stay",
    "百川智能 模型",
    "naïve café ☕",
    "line\nbreak\ttab",
    "</s><s><unk><reserved_106>",
    "",
    " ",
    "a",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [
        f"{item.doc} {item.claim} 12 34 567 890" for item in generate_items("news", "train", 300, 0)
    ]
    return BaichuanTokenizer(str(train_tokenizer(texts, path, 640)))


def test_ids_are_sentencepieces_own(tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    for text in TEXTS:
        if "<reserved" not in text:
            assert (
                tokenizer.encode_text(text)
                == reference.encode(text)
                == tokenizer(text)["input_ids"]
            )


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip_to_the_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_no_dummy_prefix_digits_one_by_one_and_bytes_for_the_unknown(tokenizer):
    assert not tokenizer.tokenize("firm")[0].startswith("▁")
    assert [piece for piece in tokenizer.tokenize("2023")] == list("2023")
    assert tokenizer.tokenize("☕") == ["<0xE2>", "<0x98>", "<0x95>"]


MARKS = (
    "<reserved_106>",
    "a<reserved_107>b",
    "<<reserved_106><reserved_107>>",
    "<reserved_1<reserved_106>06>",
)


def test_the_test_file_holds_reserved_marks_as_the_published_one_does(tokenizer):
    """As user-defined pieces, which SentencePiece itself reads from any text."""
    assert tokenizer.sp.encode("<reserved_107>") == [196]
    assert not tokenizer.sp.is_control(196) and tokenizer.sp.is_control(2)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("text", MARKS)
def test_a_reserved_mark_is_never_read_from_text(tokenizer, text, split):
    reserved = set(range(3, 3 + RESERVED))
    for ids in (
        tokenizer.encode_text(text),
        tokenizer(text, split_special_tokens=split)["input_ids"],
        tokenizer.build_chat([{"role": "assistant", "content": text}])[1:],
    ):
        assert not reserved & set(ids) and tokenizer.decode(ids) == text


def test_special_tokens_are_read_where_hugging_face_reads_them(tokenizer):
    text = "a</s>"
    plain = [*tokenizer.encode_text("a"), *tokenizer.encode_text("</s>")]
    assert (
        tokenizer(text)["input_ids"] == tokenizer.encode(text) == [*tokenizer.encode_text("a"), 2]
    )
    assert tokenizer.tokenize(text)[-1] == tokenizer.eos_token
    assert (
        tokenizer(text, split_special_tokens=True)["input_ids"]
        == tokenizer.encode_text(text)
        == plain
    )
    careful = BaichuanTokenizer(tokenizer.vocab_file, split_special_tokens=True)
    assert careful(text)["input_ids"] == plain and 2 not in plain
    assert (
        tokenizer.decode([*plain, 2]) == "a</s></s>"
        and tokenizer.decode([*plain, 2], skip_special_tokens=True) == text
    )


def test_added_tokens_are_read_written_counted_and_saved(tokenizer, tmp_path):
    changed = BaichuanTokenizer(tokenizer.vocab_file)
    assert (
        changed.add_tokens(["<tool>", "a"]) == 1 and changed.add_tokens(["<tool>"]) == 0
    )  # `a` is in the file
    assert (
        changed.add_tokens(["<reserved_107>"], special_tokens=True) == 0
    )  # is in the file: from now on it is read
    number = changed.convert_tokens_to_ids("<tool>")
    assert number == changed.vocab_size and len(changed) > changed.vocab_size
    changed.save_pretrained(tmp_path)
    for one in (changed, AutoTokenizer.from_pretrained(tmp_path)):
        text = "a<tool> b<reserved_107>c"
        ids = one(text)["input_ids"]
        assert (
            ids.count(number) == ids.count(196) == 1
            and one.decode(ids) == text == one.batch_decode([ids])[0]
        )
        assert one.decode(ids, skip_special_tokens=True) == "a<tool> bc"
        assert one.encode_text("<reserved_107>") == tokenizer.encode_text("<reserved_107>")


def _released_chat(tokenizer, messages, max_input):
    """What `build_chat_input` of the published generation_utils.py builds, in its order of
    decisions."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rounds = []
    for message in messages[1:] if system else messages:
        if message["role"] == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    head, history = tokenizer.encode_text(system), []
    for turns in reversed(rounds):
        ids = [
            i
            for turn in turns
            for i in [
                195 if turn["role"] == "user" else 196,
                *tokenizer.encode_text(turn["content"]),
            ]
        ]
        if history and len(history) + len(ids) > max_input - len(head):
            break
        history = ids + history
        if len(history) >= max_input - len(head):
            break
    ids = head + history + ([] if messages[-1]["role"] == "assistant" else [196])
    return ids[-max_input:]


def test_a_long_chat_is_cut_as_the_release_cuts_it(tokenizer):
    turns = [
        {"role": role, "content": f"{role} {n} " + "yes " * (n % 3)}
        for n in range(4)
        for role in ("user", "assistant")
    ]
    chats = [
        turns,
        turns[:-1],
        turns[1:],
        [{"role": "system", "content": "be brief"}, *turns],
        [{"role": "system", "content": "be brief"}, *turns[:-1]],
        [{"role": "system", "content": "be brief"}],
    ]
    for chat in chats:
        whole = tokenizer.build_chat(chat)
        for limit in range(1, len(whole) + 2):
            assert tokenizer.build_chat(chat, limit) == _released_chat(tokenizer, chat, limit), (
                chat,
                limit,
            )
    system = tokenizer.encode_text("be brief")
    shorter = tokenizer.build_chat(chats[4], len(tokenizer.build_chat(chats[4])) - 2)
    assert shorter[: len(system) + 1] == [
        *system,
        195,
    ]  # the first round is gone, the system text is not
    with pytest.raises(ValueError, match="'system'.*first message"):
        tokenizer.build_chat([turns[0], {"role": "system", "content": "late"}])


def test_chat_marks_are_ids_195_and_196(tokenizer):
    assert (
        tokenizer.sp.id_to_piece(195) == "<reserved_106>"
        and tokenizer.sp.id_to_piece(196) == "<reserved_107>"
    )
    ids = tokenizer.build_chat(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "<reserved_107>"}]
    )
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
    (tmp_path / "lfs.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:79\nsize 2001107\n"
    )
    with pytest.raises(ValueError, match=r"lfs.model \(70 bytes\).*Git LFS pointer"):
        BaichuanTokenizer(str(tmp_path / "lfs.model"))
    with pytest.raises(ValueError, match="453 ids"):
        train_tokenizer(["a b c"], tmp_path / "t.model", 400)
