"""The ranks that encode together: those that see the same rows, as samples x chunks."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from cvx_core.mesh import Mesh
from cvx_core.spec import Spec
from cvx_plugins.parallel.borrowing import samples_and_chunks


def groups(mesh: Mesh, spec: Spec) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """Return this rank's groups: ranks that code other samples, and ranks that code other chunks of its own.

    None where a group has one rank. Collective over the world.
    """
    names = {choice.name for choice in spec.parallel}
    ranks = mesh.size("model")
    samples, chunks = samples_and_chunks(
        ranks, spec.loader.batch, by_sample="encoder-dp" in names, by_chunk="vae-cp" in names
    )
    if ranks == 1:
        return None, None
    if ranks in (samples, chunks):
        group = mesh.group("model")
        return (group, None) if samples > 1 else (None, group)
    both = mesh.along("model")._unflatten(0, (samples, chunks), ("samples", "chunks"))
    return both.get_group("samples"), both.get_group("chunks")
