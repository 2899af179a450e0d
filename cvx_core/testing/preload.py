"""Imports what ranks would each import for themselves; the server that they are forked from loads it.

What cannot be imported here is left to the ranks, which say so: an error would end the server.
"""

import gc
import pkgutil
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points

from cvx_core import placing  # noqa: F401
from cvx_core.hooks import GROUP

# What components import when they are built, and torch when an optimizer is made or a block compiled.
LATE = (
    "transformers.models.t5.modeling_t5",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.export._trace",
    "functorch.compile",
    "networkx",
    "torch.distributed.fsdp",
    "einops._torch_specific",
)

for package in sorted({entry.module.split(".")[0] for entry in entry_points(group=GROUP)}):
    with suppress(Exception):
        path = getattr(import_module(package), "__path__", ())  # a plugin may be one module
        for module in pkgutil.walk_packages(path, f"{package}.", onerror=lambda _name: None):
            with suppress(Exception):
                import_module(module.name)
for name in LATE:
    with suppress(Exception):
        import_module(name)
gc.collect()
gc.freeze()  # or every rank would walk through all of this again and again, and copy its pages
