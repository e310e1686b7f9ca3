"""Ordinary scripts around the model class: transformers' Trainer, TRL's SFTTrainer, peft, the Auto
classes."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto

import micro
from vramlab import auto_classes
from vramlab.baichuan import BaichuanForCausalLM, BaichuanTokenizer, train_tokenizer
from vramlab.files import ROOT
from vramlab.regimes.head.head import Fused

# of peft and TRL, which still use a name that transformers gave up
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)
RATE = 0.5
SENTENCES = [
    "the firm rose",
    "prices fell 12 points in 2023 and then rose again",
    "a bank",
    "the bank of the north said yes",
    "no firm said that the price of oil fell",
]
SETTINGS = {
    "learning_rate": RATE,
    "max_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "warmup_steps": 0,
}


def _rows(lengths) -> list[dict]:
    """Rows of 12 tokens, of which the first so many of a list are labelled: the first token of a
    row is never predicted."""
    ids = torch.randint(3, 61, (len(lengths), 12), generator=torch.Generator().manual_seed(5))
    return [
        {
            "input_ids": row,
            "labels": torch.where(torch.arange(12) < length, row, -100),
            "attention_mask": torch.ones_like(row),
        }
        for row, length in zip(ids, lengths, strict=True)
    ]


def _mean_loss(model, rows: list[dict]) -> torch.Tensor:
    """Cross-entropy of all labels of all rows, from the logits of each row alone."""
    sums = [
        F.cross_entropy(
            model(row["input_ids"][None]).logits[0, :-1],
            row["labels"][1:],
            ignore_index=-100,
            reduction="sum",
        )
        for row in rows
    ]
    return torch.stack(sums).sum() / sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def _one_step(model, rows: list[dict]) -> tuple[float, dict]:
    """The mean loss, and the weights after one step of gradient descent from it."""
    loss = _mean_loss(model, rows)
    loss.backward()
    return float(loss.detach()), {
        name: p.detach() - RATE * p.grad for name, p in model.named_parameters()
    }


def _close(model, weights: dict) -> None:
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.detach(), weights[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size, accumulate", [(6, 1), (2, 3), (1, 6)])
def test_transformers_trainer_accumulates_to_the_large_batch_whatever_is_labelled(
    tmp_path, size, accumulate, fused
):
    rows = _rows([12, 3, 5, 0, 9, 2])  # of one alone: nothing to learn, and nothing to spoil
    loss, weights = _one_step(micro.model(), rows)
    model = Fused().prepare(micro.model()) if fused else micro.model()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            **SETTINGS,
        ),
        train_dataset=rows,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    _close(model, weights)


def test_transformers_trainer_evaluates_and_predicts(tmp_path):
    rows, model = _rows([12, 3, 5]), micro.model().eval()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, **SETTINGS),
        eval_dataset=rows,
        compute_metrics=lambda scored: {"words": scored.predictions.shape[-1]},
    )
    scores = trainer.evaluate()
    assert (
        scores["eval_loss"] == pytest.approx(float(_mean_loss(model, rows).detach()), rel=1e-4)
        and scores["eval_words"] == 61
    )
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits.detach()
    unlabelled = [
        {"input_ids": row["input_ids"]} for row in rows
    ]  # a key-value cache is in what the model returns
    torch.testing.assert_close(torch.from_numpy(trainer.predict(unlabelled).predictions), logits)


# TRL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return BaichuanTokenizer(str(train_tokenizer(SENTENCES * 20, path, 490)))


def _sft(folder, model, tokenizer, packing: bool, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        str(folder), per_device_train_batch_size=8, packing=packing, max_length=64, **SETTINGS
    )
    data = Dataset.from_list([{"text": text} for text in SENTENCES])
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_sft_trains_the_normalised_head_on_whole_documents_that_end_in_id_2(
    tmp_path, tokenizer, packing, position
):
    model = micro.model(position, vocab_size=len(tokenizer))
    with torch.no_grad():  # rows of many lengths: a head that is not normalised has another loss
        model.lm_head.weight *= torch.linspace(0.2, 5, len(tokenizer))[:, None]
    rows = [{"input_ids": torch.tensor([*tokenizer.encode_text(text), 2])} for text in SENTENCES]
    loss, weights = _one_step(model, [{**row, "labels": row["input_ids"]} for row in rows])
    model.zero_grad()
    trainer = _sft(tmp_path, model, tokenizer, packing)
    assert sum(list(ids).count(2) for ids in trainer.train_dataset["input_ids"]) == len(SENTENCES)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    _close(model, weights)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_with_lora_on_all_linear_layers_trains_only_the_adapters(tmp_path, tokenizer, packing):
    model = micro.model(vocab_size=len(tokenizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = _mean_loss(
        model,
        [
            {"input_ids": ids, "labels": ids}
            for text in SENTENCES
            for ids in [torch.tensor([*tokenizer.encode_text(text), 2])]
        ],
    )
    trainer = _sft(
        tmp_path,
        model,
        tokenizer,
        packing,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(state[name], weight) for name, weight in before.items())
    assert sum(bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name) == 3 * 5
    ids = torch.arange(3, 13)[None]
    adapted = trainer.model.eval()(ids).logits
    torch.testing.assert_close(
        trainer.model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-5
    )


# the output embeddings ----------------------------------------------------------------------------


def test_whoever_multiplies_with_the_output_embeddings_multiplies_with_normalised_rows():
    model, hidden = micro.model(), torch.randn(2, 20)
    with torch.no_grad():
        model.lm_head.weight *= 3
    head = model.get_output_embeddings()
    torch.testing.assert_close(F.linear(hidden, head.weight, head.bias), model.lm_head(hidden))
    head.weight.square().sum().backward()  # |row| = 1 whatever the row: no gradient along it
    assert model.lm_head.weight.grad.abs().max() < 1e-5 and not list(head.parameters())
    assert not hasattr(
        model.lm_head, "bias"
    )  # without it nobody takes the stored weight for a linear layer's


def test_a_trained_copy_of_the_head_is_normalised_too():
    model = get_peft_model(
        micro.model(), LoraConfig(r=2, target_modules=["W_pack"], modules_to_save=["lm_head"])
    )
    copy = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(torch.linspace(1, 5, 61)[:, None]).add_(0.1)
    head, hidden = model.get_output_embeddings(), torch.randn(1, 2, 20)
    torch.testing.assert_close(head.weight, F.normalize(copy.weight))
    torch.testing.assert_close(head(hidden), model.get_base_model().lm_head(hidden))


@pytest.mark.parametrize("mean", [False, True])
def test_resized_embeddings_keep_the_old_logits_and_are_saved_with_an_adapter(tmp_path, mean):
    torch.manual_seed(0)
    model = micro.model().eval()
    ids = torch.arange(3, 13)[None]
    before = model(ids).logits.detach()
    with torch.no_grad():
        model.resize_token_embeddings(64, mean_resizing=mean)
    assert model.config.vocab_size == 64 and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(ids).logits[..., :61], before)
    loss = model(torch.full((1, 4), 63), labels=torch.full((1, 4), 63)).loss
    loss.backward()
    assert (
        loss.isfinite()
        and model.lm_head.weight.grad[63].any()
        and model.lm_head.weight.shape == (64, 20)
    )
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["W_pack"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    again = micro.model(seed=1).eval()
    again.resize_token_embeddings(64)
    again = PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(again.get_base_model().lm_head.weight, model.lm_head.weight)


# the Auto classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_label_smoothing_of_transformers_trainer_teaches_the_next_token(lora, tmp_path):
    """It moves the labels only for classes that it knows by name; else each token would learn to
    predict itself."""
    model = (
        get_peft_model(micro.model(), LoraConfig(target_modules=["W_pack"]))
        if lora
        else micro.model()
    )
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, **SETTINGS)
    )
    batch = {
        name: torch.stack([row[name] for row in _rows([12, 5])])
        for name in ("input_ids", "labels", "attention_mask")
    }
    own = float(model(**batch).loss.detach())
    assert float(trainer.compute_loss(model, dict(batch)).detach()) == pytest.approx(own, rel=1e-4)


FIRST = """
import sys
import vramlab
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoTokenizer
assert "vramlab.baichuan" not in sys.modules
print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__module__)
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=False)
print(type(config).__module__, type(AutoModelForCausalLM.from_config(config)).__module__)
"""


def test_importing_the_package_alone_lets_the_auto_classes_find_the_model_and_imports_no_torch(
    tmp_path, tokenizer
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    micro.model().config.save_pretrained(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST, tmp_path / "tokenizer", tmp_path / "model"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert ran.stdout.split() == [
        f"vramlab.baichuan.{name}" for name in ("tokenizer", "config", "model")
    ]


def test_the_auto_classes_find_the_model_where_transformers_was_imported_first(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for table in (
        configuration_auto.CONFIG_MAPPING_NAMES,
        tokenization_auto.TOKENIZER_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        monkeypatch.delitem(table, "baichuan")
    importlib.reload(auto_classes)
    assert configuration_auto.CONFIG_MAPPING_NAMES["baichuan"] == "BaichuanConfig"
    assert tokenization_auto.TOKENIZER_MAPPING_NAMES["baichuan"] == "BaichuanTokenizer"
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["baichuan"] == "BaichuanForCausalLM"


def test_a_folder_saved_from_a_published_one_names_no_code_that_it_does_not_hold(tmp_path):
    import released

    model = micro.model(vocab_size=520)
    released.checkpoint(tmp_path / "published", model, safe=True)
    released.tokenizer(tmp_path / "published", SENTENCES * 20, 490)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "published", trust_remote_code=False)
    assert type(loaded) is BaichuanForCausalLM and type(tokenizer) is BaichuanTokenizer
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.json"):
        assert "auto_map" not in file.read_text(), file.name


def test_whatever_the_package_loads_by_an_auto_class_runs_no_code_of_the_folder():
    calls = [
        (file.name, call)
        for file in (ROOT / "lib").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).startswith("Auto")
        and ast.unparse(call.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 3
    for file, call in calls:
        assert "trust_remote_code=False" in map(ast.unparse, call.keywords), (file, call.lineno)
