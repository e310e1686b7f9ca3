"""Baichuan-2 for transformers' Auto classes. Importing this lets them find it by name, and imports
neither torch nor transformers.

transformers may be imported before or after. Each of its tables of names gets an entry as soon as
the module that holds the table has run. The module in which it looks these names up,
`transformers.models.baichuan`, is a copy of `vramlab.baichuan`, which registers its classes in the
usual way when it is imported.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import spec_from_loader

TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", "BaichuanConfig"),
    # transformers' Trainer reads from it whether label smoothing has to shift the labels
    "transformers.models.auto.modeling_auto": (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "BaichuanForCausalLM",
    ),
    "transformers.models.auto.tokenization_auto": ("TOKENIZER_MAPPING_NAMES", "BaichuanTokenizer"),
}
"""Module of transformers -> (its table, the class that is added)."""


class Finder(MetaPathFinder, Loader):
    """Provides `transformers.models.baichuan`, and fills in the tables when their modules have
    run."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers.models.baichuan":
            return spec_from_loader(name, self)
        if name in TABLES:
            spec = PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), add_name(module))
            return spec

    def exec_module(self, module) -> None:
        names = {**vars(import_module("vramlab.baichuan")), "__name__": module.__name__}
        vars(module).update(names)


def add_name(module) -> None:
    """Add Baichuan-2's class to the table of a module of transformers."""
    table, name = TABLES[module.__name__]
    getattr(module, table).setdefault("baichuan", name)


sys.meta_path.insert(0, Finder())
for loaded in sys.modules.keys() & TABLES:
    add_name(sys.modules[loaded])
