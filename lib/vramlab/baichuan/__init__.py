"""Baichuan-2 as a transformers model. Importing this registers it for the Auto classes under
`baichuan`; importing `vramlab` is enough for them to find it."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import mkl_warmup  # noqa: F401, before threads share a first call
from .config import BaichuanConfig, ModelSpec, read_model_file
from .loading import load_model
from .model import BaichuanForCausalLM, BaichuanModel
from .tokenizer import BaichuanTokenizer, train_tokenizer

AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoTokenizer.register(BaichuanConfig, slow_tokenizer_class=BaichuanTokenizer, exist_ok=True)

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanModel",
    "BaichuanTokenizer",
    "ModelSpec",
    "load_model",
    "read_model_file",
    "train_tokenizer",
]
