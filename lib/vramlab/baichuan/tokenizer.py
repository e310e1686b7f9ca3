"""Baichuan-2's tokenizer: exactly what the SentencePiece file says, nothing guessed from text.

No normalisation, no dummy prefix, digits one by one, bytes for what is unknown. Control pieces, the reserved chat marks
195 and 196 among them, enter as ids only: text that spells `</s>` or `<reserved_106>` is text. The released remote
tokenizer no longer loads, and Llama's adds a prefix and reads special strings from text.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizer

USER_ID, ASSISTANT_ID = 195, 196
RESERVED = 194
"""Control pieces between `</s>` (2) and the first byte, such that ids 195 and 196 are `<reserved_106>`, `<reserved_107>`."""


class BaichuanTokenizer(PreTrainedTokenizer):
    """A thin cover of SentencePiece. Padding is `<unk>`, id 0, as released. Adds no start and no end by default."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ("input_ids", "attention_mask")
    user_id, assistant_id = USER_ID, ASSISTANT_ID

    def __init__(self, vocab_file: str, add_bos_token: bool = False, add_eos_token: bool = False, **kwargs):
        if not os.path.isfile(vocab_file):
            raise FileNotFoundError(f"no SentencePiece model at {vocab_file}: copy the checkpoint's tokenizer.model there")
        import sentencepiece  # here: a machine that only trains on made-up tokens does without

        self.vocab_file, self.add_bos_token, self.add_eos_token = vocab_file, add_bos_token, add_eos_token
        # before the base class, which asks for the vocabulary while it is being made
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(vocab_file))
        for name, piece in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<unk>")):
            kwargs.setdefault(name, piece)
        super().__init__(add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(self, text: str, **kwargs) -> list[str]:
        return self.sp.encode(text, out_type=str)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(int(index))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.sp.decode_pieces(list(tokens))

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        return start + list(token_ids_0) + end + (start + list(token_ids_1) + end if token_ids_1 else [])

    def encode_text(self, text: str) -> list[int]:
        """The text's ids, and nothing else."""
        return self.sp.encode(text)

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        """Exact inverse of `encode_text`. Control pieces are spelled out unless skipped."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if token_ids and isinstance(token_ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in token_ids]
        text, run = [], []
        for index in token_ids:
            if self.sp.is_control(index) or self.sp.is_unknown(index):
                text += [self.sp.decode(run), "" if skip_special_tokens else self.sp.id_to_piece(index)]
                run = []
            else:
                run.append(index)
        return "".join([*text, self.sp.decode(run)])

    def build_chat(self, messages: Iterable[Mapping[str, str]], max_length: int | None = None) -> list[int]:
        """Chat ids as released: system text, then [195] user [196] assistant ..., no end between turns, a last [196] when
        the user spoke last; too long a chat loses its beginning. Raises ValueError for an unknown role."""
        marks = {"system": [], "user": [USER_ID], "assistant": [ASSISTANT_ID]}
        ids, last = [], None
        for message in messages:
            last = message["role"]
            if last not in marks:
                raise ValueError(f"role is {last!r}: a chat has {', '.join(marks)}")
            ids += marks[last] + self.encode_text(message["content"])
        ids += [ASSISTANT_ID] if last == "user" else []
        return ids[-max_length:] if max_length else ids

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def train_tokenizer(texts: Iterable[str], path: Path | str, vocab_size: int, words: Sequence[str] = ()) -> Path:
    """Train a SentencePiece BPE with the paper's options (2.3) on `texts` and write it to `path`.

    Each of `words` is one piece, without the shorter pieces that merging it would leave in a small vocabulary; their ids
    follow the control pieces'. A longer word that begins with one of them is cut behind it.
    Raises: ValueError, when `vocab_size` cannot hold the control pieces, the words and the bytes.
    """
    fixed = 3 + RESERVED + len(words) + 256
    if vocab_size <= fixed:
        raise ValueError(f"vocab_size is {vocab_size}: {fixed} ids are control pieces, words and bytes, use more")
    path = Path(path)
    reserved = [f"<reserved_{i - 89}>" for i in range(3, 3 + RESERVED)]  # so that id 195 is <reserved_106>
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=vocab_size,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.9999, byte_fallback=True, max_sentencepiece_length=32,
        control_symbols=reserved, user_defined_symbols=list(words), minloglevel=2, num_threads=1, hard_vocab_limit=True)
    trained = path.with_suffix("").with_name(path.with_suffix("").name + ".model")
    if trained != path:
        trained.rename(path)
    path.with_suffix(".vocab").unlink(missing_ok=True)
    return path
