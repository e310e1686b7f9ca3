"""What others publish, as their repositories look, with tiny weights: a Baichuan-2 checkpoint,
FactCC's data, a checker."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vramlab.baichuan.tokenizer import train_tokenizer

FACTCC = {
    "train": "unpaired_generated_data/data-original/data-train.jsonl",
    "val": "unpaired_annotated_data/val/data-dev.jsonl",
    "test": "unpaired_annotated_data/test/data-dev.jsonl",
}
"""Where its release keeps the claims; the annotated files are both called data-dev."""


def checkpoint(folder, model, shards=1, safe=False, dtype=torch.bfloat16, **config):
    """Write `model` the way the published repositories look: config.json, shards, index, a rotary
    buffer in the file."""
    folder.mkdir(exist_ok=True)
    content = {
        **model.config.to_dict(),
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {"AutoModel": "x.Y"},
        "gradient_checkpointing": [False],
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content))
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    write = save_file if safe else torch.save
    names = list(state)
    if shards == 1:
        write(state, folder / f"{stem}.{suffix}")
        return state
    files = {}
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name] for name in names[index::shards]}
        write(part, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return state


def tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """A tokenizer beside a checkpoint: the SentencePiece file, and a configuration that points at
    remote code."""
    train_tokenizer(texts, folder / "tokenizer.model", size)
    marks = {
        f"{name}_token": {
            "__type": "AddedToken",
            "content": piece,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": True,
        }
        for name, piece in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<unk>"), ("unk", "<unk>"))
    }
    content = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        "use_fast": False,
        **marks,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def factcc(folder: Path, rows: dict[str, list[dict]], stories: dict[str, str]) -> None:
    """FactCC's release, which has no articles, and a folder of CNN/DM stories."""
    for split, lines in rows.items():
        file = folder / "factcc" / FACTCC[split]
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in stories.items():
        file = folder / "stories" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n\n@highlight\n\nnot read")


def checker(folder: Path, labels: list[str], words: list[str], seed: int = 0) -> Path:
    """A BERT that classifies pairs, with random weights, which are the same for the same seed
    whatever its labels are called."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(seed)
    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=48).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=48,
        id2label=dict(enumerate(labels)),
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
