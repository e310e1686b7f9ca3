"""Baichuan-2 for transformers' Auto classes: importing this lets them find it by name, and imports
neither torch nor transformers.

transformers may be imported before or after. Its tables of names get an entry each, as soon as the
modules that hold them have run; the module in which it looks these names up,
`transformers.models.baichuan`, has what `vramlab.baichuan` has, which registers its classes in the
usual way when it is imported.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from importlib.util import spec_from_loader

TABLES = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", "BaichuanConfig"),
    # in which transformers' Trainer looks whether label smoothing has to move the labels
    "transformers.models.auto.modeling_auto": (
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "BaichuanForCausalLM",
    ),
    "transformers.models.auto.tokenization_auto": ("TOKENIZER_MAPPING_NAMES", "BaichuanTokenizer"),
}


class Finder(MetaPathFinder, Loader):
    """Finds the module that is not there, and has the tables filled in once their modules have
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
        vars(module).update(
            {**vars(import_module("vramlab.baichuan")), "__name__": module.__name__}
        )


def add_name(module) -> None:
    table, name = TABLES[module.__name__]
    getattr(module, table).setdefault("baichuan", name)


sys.meta_path.insert(0, Finder())
for loaded in sys.modules.keys() & TABLES:
    add_name(sys.modules[loaded])
