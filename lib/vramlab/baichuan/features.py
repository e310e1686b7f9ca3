"""What a model's settings may hold: the fields of `BaichuanConfig`, keys that change no step, and features that it does not have.

Other families' files name features by keys that a Baichuan-2 does not know. To leave one out silently would make another model of
it, with other bytes: so each is refused by name, and so is a key that nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..reading import check_type, short, unknown

_HARMLESS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _from_model_config _name_or_path
    add_cross_attention architectures assistant_token_id attn_implementation auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
    prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 user_token_id
    """
HARMLESS = frozenset(_HARMLESS.split())
"""Keys of published and saved `config.json` files that change nothing about a training step."""
DTYPES = ("float32", "bfloat16", "float16")
"""What `dtype`, or `torch_dtype` as it was called, may be."""


def _absent(value: Any, config: Mapping) -> bool:
    return value in (None, False, 0, 0.0)


def _is(*allowed: Any) -> Callable[[Any, Mapping], bool]:
    return lambda value, config: value in allowed


UNSUPPORTED: dict[str, tuple[Callable[[Any, Mapping], bool], str]] = {
    "model_type": (_is("baichuan"), "another family of models"),
    "num_key_value_heads": (lambda value, config: value in (None, config["num_attention_heads"]),
                            "heads of keys and values that several heads of queries share"),
    "head_dim": (lambda value, config: value is None or value * config["num_attention_heads"] == config["hidden_size"],
                 "heads that together are not hidden_size wide"),
    "tie_word_embeddings": (_absent, "a head that shares the embedding's weight"),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "add_qkv_bias", "use_bias", "use_qkv_bias", "bias"),
                    (_absent, "biases")),
    **dict.fromkeys(("sliding_window", "use_sliding_window", "attention_window_size"), (_absent, "attention in a sliding window")),
    **dict.fromkeys(("rope_scaling", "rope_ratio"), (_absent, "scaled rotary positions")),
    "rope_parameters": (lambda value, config: value is None or value.get("rope_type", "default") == "default",
                        "scaled rotary positions"),
    "partial_rotary_factor": (_is(None, 1), "positions on a part of each head"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (_absent, "experts")),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (_absent, "logits that are capped")),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm"), (_absent, "norms of queries and keys")),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), (_absent, "dropout")),
    "quantization_config": (_absent, "weights that are stored quantized"),
    "pretraining_tp": (_is(None, 1), "products cut into slices"),
}
"""Key -> whether its value asks for nothing that a Baichuan-2 lacks, and what it lacks."""


def check_config(content: Mapping[str, Any], kinds: Mapping[str, str], sizes: Mapping[str, Any]) -> None:
    """Raises: ValueError, where `content` is no Baichuan-2's config: every reason, each with the key and the value. `kinds`: own
    field -> annotation. `sizes`: the fields that `content` leaves out."""
    known = {*kinds, *HARMLESS, *UNSUPPORTED, "dtype", "torch_dtype"}
    wrong = [name for name in content if name not in known]
    found = [f"it has no {unknown(wrong, known)}, but {', '.join(kinds)}"] if wrong else []
    for name, value in content.items():
        try:
            check_type(name, value, kinds.get(name, "any"))
        except ValueError as error:
            found.append(str(error))
    dtypes = {name: content.get(name) for name in ("dtype", "torch_dtype")}
    found += [f"{name} is {short(value)}: use one of {', '.join(DTYPES)}" for name, value in dtypes.items()
              if value not in (None, *DTYPES)]
    found += unsupported(content, {**sizes, **content})
    if found:
        raise ValueError(f"config: {'; '.join(found)}")


def unsupported(content: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """The features in `content` that a Baichuan-2 lacks, as text."""
    def is_right(name: str) -> bool:
        try:
            return UNSUPPORTED[name][0](content[name], sizes)
        except (TypeError, AttributeError):  # a value of another type
            return False

    return [f"{name} is {short(content[name])}, {UNSUPPORTED[name][1]}: a Baichuan-2 has none, so it would be another model"
            for name in UNSUPPORTED if name in content and not is_right(name)]
