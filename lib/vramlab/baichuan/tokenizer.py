"""Baichuan-2's tokenizer: exactly the SentencePiece file, without guesses from text.

No normalisation, no dummy prefix, digits one by one, bytes for unknown characters. Special tokens
work as in Hugging Face: calling the tokenizer reads `</s>` in a text as id 2, so that a trainer's
text + eos_token ends in it, unless `split_special_tokens` is true; `encode_text` and `build_chat`
never do. Neither reads a reserved mark such as `<reserved_106>`: in the published file these are
user-defined pieces, which SentencePiece would find in any text, and two of them are the marks of a
chat (195, 196). `add_tokens(["<reserved_106>"])` makes the tokenizer read one. The released remote
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
"""Number of reserved marks after `</s>` (2): with it ids 195 and 196 are `<reserved_106>` and
`<reserved_107>`."""
WITHIN_A_MARK = re.compile(r"(?<=<)(?=reserved_\d+>)")
"""The place at which a text that spells a reserved mark is cut, so that no piece spans it."""


class BaichuanTokenizer(PreTrainedTokenizer):
    """A thin wrapper of SentencePiece. Padding is `<unk>`, id 0, as released. By default it adds
    neither a start nor an end token."""

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
        import sentencepiece  # here: training on random tokens does not need it

        kwargs.pop("auto_map", None)  # names remote code, which a saved folder would not hold
        self.vocab_file = vocab_file
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        try:  # before the base class, which asks for the vocabulary in its own initialisation
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{vocab_file} ({os.path.getsize(vocab_file)} bytes) is no SentencePiece model, it"
                " may be a Git LFS pointer or cut off: download it again"
            ) from error
        special = {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
        }
        super().__init__(
            add_bos_token=add_bos_token, add_eos_token=add_eos_token, **{**special, **kwargs}
        )

    @property
    def vocab_size(self) -> int:
        return self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        parts = WITHIN_A_MARK.split(text)
        return [piece for part in parts for piece in self.sp.encode(part, out_type=str)]

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
        pair = [*start, *token_ids_1, *end] if token_ids_1 else []
        return [*start, *token_ids_0, *end, *pair]

    def encode_text(self, text: str) -> list[int]:
        """The ids of the text alone: a special token or a mark that it spells out is text."""
        return [index for part in WITHIN_A_MARK.split(text) for index in self.sp.encode(part)]

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        """Exact inverse of `encode_text`. Special and added tokens are spelled out; special ones
        are left out with `skip_special_tokens`."""
        skipped = self.all_special_ids if skip_special_tokens else ()
        parts: list[str] = []
        pieces: list[int] = []
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            if index in self._added_tokens_decoder:
                content = self._added_tokens_decoder[index].content
                parts += [self.sp.decode(pieces), "" if index in skipped else content]
                pieces = []
            else:
                pieces.append(index)
        return "".join([*parts, self.sp.decode(pieces)])

    def build_chat(
        self, messages: Iterable[Mapping[str, str]], max_length: int | None = None
    ) -> list[int]:
        """Chat ids as released: system text, then [195] user [196] assistant ..., no end token
        between turns, and a last [196] unless the assistant spoke last.

        A chat longer than `max_length` loses its first rounds (a user's turn and the answers to
        it). When the system text and the last round alone are longer, their beginning is cut off.
        Raises: ValueError, for an unknown role, or a system text that is not the first message.
        """
        messages, system = list(messages), []
        if messages and messages[0]["role"] == "system":
            system = self.encode_text(messages.pop(0)["content"])
        marks = {"user": [USER_ID], "assistant": [ASSISTANT_ID]}
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
        answered = messages and messages[-1]["role"] == "assistant"
        ids = system + history + ([] if answered else [ASSISTANT_ID])
        return ids[-max_length:] if max_length else ids

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory, f"{prefix}tokenizer.model")
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def train_tokenizer(
    texts: Iterable[str], path: Path | str, vocab_size: int, words: Sequence[str] = ()
) -> Path:
    """Train a SentencePiece BPE with the paper's options (2.3) on `texts` and write it to `path`.

    Reserved marks and each of `words` are user-defined pieces, as in the published file: a word is
    one piece, without the shorter pieces that merging it would leave in a small vocabulary. A
    longer word that begins with one of them is cut after it. Raises: ValueError, when `vocab_size`
    cannot hold the marks, the words and the bytes.
    """
    import sentencepiece

    fixed = 3 + RESERVED + len(words) + 256
    if vocab_size <= fixed:
        raise ValueError(
            f"vocab_size is {vocab_size}: {fixed} ids are marks, words and bytes, use more"
        )
    reserved = [f"<reserved_{i - 89}>" for i in range(3, 3 + RESERVED)]  # 195: <reserved_106>
    model = io.BytesIO()  # a file's name would be written into the model
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
