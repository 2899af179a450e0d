"""A plan for every bucket of a recipe: batches of each have a geometry and a number of rows of their own."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from cvx_core.bucket_config import geometries
from cvx_core.spec import Spec, resolve


def of_each(spec: Spec) -> dict[str, Spec]:
    """Return {bucket: the recipe at its geometry alone}, those aside that take no clip.

    Of the aspect ratios of a bucket it is the one with most pixels, and the square one of `own`. Without
    buckets it is {"": the recipe}.
    """
    table = spec.loader.buckets
    if table is None:
        return {"": spec}
    aspects = ("1:1",) if spec.loader.aspects == "own" else spec.loader.aspects
    largest: dict[str, tuple[int, int, int]] = {}
    for place, frames, height, width in geometries(table, aspects, spec.card.size_step):
        most = largest.get(place)
        if most is None or height * width > most[1] * most[2]:
            largest[place] = frames, height, width
    specs = {}
    for place, geometry in largest.items():
        keep, batch = table[place.rpartition(".")[0]][geometry[0]]
        if keep > 0:
            specs[place] = _at(spec, *geometry, batch)
    return specs


def _at(spec: Spec, frames: int, height: int, width: int, batch: int) -> Spec:
    data = deepcopy(spec.recipe.data)
    for name in ("buckets", "aspects", "enlarge"):
        data["loader"].pop(name, None)
    data["loader"]["batch"] = batch
    data["video"] = {**data.get("video", {}), "frames": frames, "height": height, "width": width}
    return resolve(replace(spec.recipe, data=data), spec.registry)
