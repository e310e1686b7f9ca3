"""Baichuan-2's tokenizer: exactly what the SentencePiece file says, nothing guessed from text.

No normalisation, no dummy prefix, digits one by one, bytes for what is unknown. Special tokens have
Hugging Face's meaning: calling the tokenizer reads `</s>` in a text as id 2, so that a trainer's
text + eos_token ends in it, unless `split_special_tokens` is true; `encode_text` and `build_chat`
never read one. Neither reads a reserved mark, `<reserved_106>`: in the published file these are
user-defined pieces, which SentencePiece would find in any text, and two of them are the marks of a
chat (195, 196). Who wants one read adds it: `add_tokens(["<reserved_106>"])`. The released remote
tokenizer no longer loads, and Llama's adds a prefix.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizer

USER_ID, ASSISTANT_ID = 195, 196
RESERVED = 194
"""Marks between `</s>` (2) and the first byte, such that ids 195 and 196 are `<reserved_106>`,
`<reserved_107>`."""
WITHIN_A_MARK = re.compile(r"(?<=<)(?=reserved_\d+>)")
"""Where a text that spells a reserved mark is cut, so that no piece spans it."""


class BaichuanTokenizer(PreTrainedTokenizer):
    """A thin cover of SentencePiece. Padding is `<unk>`, id 0, as released. Adds no start and no
    end by default."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ("input_ids", "attention_mask")
    user_id, assistant_id = USER_ID, ASSISTANT_ID

    def __init__(
        self, vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False, **kwargs
    ):
        if not os.path.isfile(vocab_file):
            raise FileNotFoundError(
                f"no SentencePiece model at {vocab_file}: copy the checkpoint's tokenizer.model"
                " there"
            )
        import sentencepiece  # here: a machine that only trains on made-up tokens does without

        kwargs.pop(
            "auto_map", None
        )  # of a published file: it names code that a saved folder would not hold
        self.vocab_file, self.add_bos_token, self.add_eos_token = (
            vocab_file,
            add_bos_token,
            add_eos_token,
        )
        # before the base class, which asks for the vocabulary while it is being made
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{vocab_file} ({os.path.getsize(vocab_file)} bytes) is no SentencePiece model, it"
                " may be a Git LFS pointer or cut off: download it again"
            ) from error
        for name, piece in (
            ("unk_token", "<unk>"),
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("pad_token", "<unk>"),
        ):
            kwargs.setdefault(name, piece)
        super().__init__(add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {
            self.sp.id_to_piece(i): i for i in range(self.vocab_size)
        } | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [
            piece
            for part in WITHIN_A_MARK.split(text)
            for piece in self.sp.encode(part, out_type=str)
        ]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(int(index))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.sp.decode_pieces(list(tokens))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        return (
            start
            + list(token_ids_0)
            + end
            + (start + list(token_ids_1) + end if token_ids_1 else [])
        )

    def encode_text(self, text: str) -> list[int]:
        """The text's ids, and nothing else: what spells a special token or a mark is text."""
        return [index for part in WITHIN_A_MARK.split(text) for index in self.sp.encode(part)]

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        """Exact inverse of `encode_text`. Special and added tokens are spelled out; special ones
        not if they are skipped."""
        skipped = self.all_special_ids if skip_special_tokens else ()
        text, run = [], []
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            if index in self._added_tokens_decoder:
                text += [
                    self.sp.decode(run),
                    "" if index in skipped else self._added_tokens_decoder[index].content,
                ]
                run = []
            else:
                run.append(index)
        return "".join([*text, self.sp.decode(run)])

    def build_chat(
        self, messages: Iterable[Mapping[str, str]], max_length: int | None = None
    ) -> list[int]:
        """Chat ids as released: system text, then [195] user [196] assistant ..., no end between
        turns, a last [196] unless the assistant spoke last. Too long a chat loses its first rounds
        (a user's turn and what follows it); what `max_length` cannot hold even so, the last round
        and the system text, loses its beginning. Raises: ValueError, for an unknown role, or a
        system text that is not the first message."""
        marks = {"user": [USER_ID], "assistant": [ASSISTANT_ID]}
        messages = list(messages)
        system = (
            self.encode_text(messages.pop(0)["content"])
            if messages and messages[0]["role"] == "system"
            else []
        )
        rounds: list[list[int]] = []
        for message in messages:
            if (role := message["role"]) not in marks:
                raise ValueError(
                    f"role is {role!r}: a chat has system, as its first message,"
                    f" {' and '.join(marks)}"
                )
            if role == "user" or not rounds:
                rounds.append([])
            rounds[-1] += marks[role] + self.encode_text(message["content"])
        history = rounds.pop() if rounds else []
        while rounds and (max_length is None or len(system + rounds[-1] + history) <= max_length):
            history = rounds.pop() + history
        ids = (
            system
            + history
            + ([] if messages and messages[-1]["role"] == "assistant" else [ASSISTANT_ID])
        )
        return ids[-max_length:] if max_length else ids

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        target = (
            Path(save_directory)
            / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        )
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def train_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, words: Sequence[str] = ()
) -> Path:
    """Train a SentencePiece BPE with the paper's options (2.3) on `texts` and write it to `path`.

    Reserved marks and each of `words` are user-defined pieces, as the published file has them: a
    word is one piece, without the shorter pieces that merging it would leave in a small vocabulary.
    A longer word that begins with one of them is cut behind it. Raises: ValueError, when
    `vocab_size` cannot hold the marks, the words and the bytes.
    """
    fixed = 3 + RESERVED + len(words) + 256
    if vocab_size <= fixed:
        raise ValueError(
            f"vocab_size is {vocab_size}: {fixed} ids are marks, words and bytes, use more"
        )
    reserved = [
        f"<reserved_{i - 89}>" for i in range(3, 3 + RESERVED)
    ]  # so that id 195 is <reserved_106>
    import sentencepiece

    model = io.BytesIO()  # not a file's name, which would stand in the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        byte_fallback=True,
        max_sentencepiece_length=32,
        user_defined_symbols=[*reserved, *words],
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=True,
    )
    Path(path).write_bytes(model.getvalue())
    return Path(path)
