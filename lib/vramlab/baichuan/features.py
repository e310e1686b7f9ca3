"""Keys of model configs that ask for a feature of another family, and keys that change no training
step.

A model without the feature would be another one, with other bytes, so each of these keys is refused
by name.
"""

from __future__ import annotations

_HARMLESS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _from_model_config _name_or_path add_cross_attention architectures assistant_token_id
    attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers_version typical_p use_bfloat16 user_token_id
    """
HARMLESS = frozenset(_HARMLESS.split())
"""Keys of published and saved `config.json` files that change nothing about a training step."""
UNSUPPORTED = {
    "model_type": "another family of models",
    "num_key_value_heads": "heads of keys and values that heads of queries share",
    "head_dim": "heads that together are not as wide as a hidden state",
    "tie_word_embeddings": "a head that is the embedding's weight",
    **dict.fromkeys(
        (
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "add_qkv_bias",
            "use_bias",
            "use_qkv_bias",
            "bias",
        ),
        "biases",
    ),
    **dict.fromkeys(
        ("sliding_window", "use_sliding_window", "attention_window_size"),
        "attention in a sliding window",
    ),
    **dict.fromkeys(("rope_scaling", "rope_ratio", "rope_parameters"), "scaled rotary positions"),
    "partial_rotary_factor": "positions on a part of a head",
    "pretraining_tp": "products cut into slices",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "experts"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "capped logits"),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm"), "norms of queries and keys"),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "dropout",
    ),
    "quantization_config": "weights that are stored quantized",
}
"""Key -> the feature that it asks for, unless its value is empty, 0 or false, or true of every
Baichuan-2."""
