"""What a refusal proposes, followed to the letter in the recipe, passes the check."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cvx_core import RecipeError, resolve
from cvx_core.recipe import parse
from cvx_core.registry import Registry
from tests.distributed.test_wrong_meshes import TRAIN, recipe

SIZES = st.sampled_from([1, 2, 2, 3, 4])


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@st.composite
def entries(draw):
    """Strategies whose own checks take them on their own."""
    found = []
    if draw(st.booleans()):
        found.append(f"tp, size: {draw(st.sampled_from([2, 3]))}, sequence: {draw(st.booleans())}".lower())
    if draw(st.booleans()):
        found.append(f"cp, ring: {draw(SIZES)}, ulysses: {draw(st.sampled_from([2, 3]))}")
    pipelines = ["size: 2", "size: 4", "stages: [1, 1, 2]", "size: 2, schedule: interleaved"]
    pipelines.append("size: 2, schedule: zero-bubble, microbatches: 4")
    if draw(st.booleans()):
        found.append(f"pp, {draw(st.sampled_from(pipelines))}")
    data = ["ddp", "zero3, size: 3", "layerzero", "layerzero, size: 8", "layerzero, size: 6, zero3_size: 2"]
    data += ["zero1, size: 2", "layerzero, zero3_size: 3"]
    if draw(st.booleans()):
        found.append(draw(st.sampled_from(data)))
    if draw(st.booleans()) and any(entry[:2] in ("tp", "cp", "pp") for entry in found):
        found.append(draw(st.sampled_from(["encoder-dp", "vae-cp"])))
    return found


def proposals(message, world):
    """Return (changes, whether ddp is added, world) for each way out that a message names."""
    advice = message[message.index(". ") + 2 :].rstrip(".")
    for part in re.split(", or ", advice):
        changes = re.findall(r"([\w.-]+)\.(\w+) to (\d+)", part)
        worlds = re.search(r"tart ([\d or]+) process", part)
        for number in worlds[1].split(" or ") if worlds else [world]:
            yield changes, "use: ddp" in part, int(number)


def problems_of(text, registry, world):
    """Return why a mesh does not multiply out; nothing else may be wrong."""
    try:
        resolve(parse(text), registry, world)
    except RecipeError as error:
        messages = [problem.message for problem in error.problems]
    else:
        return []
    assert all("processes" in message for message in messages), messages
    return messages


def followed(data, changes, adds_ddp):
    copy = yaml.safe_load(yaml.safe_dump(data))
    for name, field, size in changes:
        [item] = [item for item in copy["parallel"] if item["use"] == name]
        item[field] = int(size)
    copy["parallel"] += [{"use": "ddp"}] if adds_ddp else []
    return yaml.safe_dump(copy)


@settings(deadline=None, max_examples=60)
@given(entries(), st.integers(1, 24))
def test_following_the_advice_passes_the_check(registry, entries, world):
    text = recipe(entries or ["recompute"], TRAIN.replace("batch: 2", "batch: 4"))
    data = yaml.safe_load(text)
    for message in problems_of(text, registry, world):
        ways = list(proposals(message, world))
        assert ways, message
        for changes, adds_ddp, number in ways:
            resolve(parse(followed(data, changes, adds_ddp)), registry, number)


TWO_FAULTS = [
    (["zero3", "pp, size: 8"], 12, "Set pp.size to 4."),
    (["zero3", "pp, size: 8"], 10, "Set pp.size to 2."),
    (["zero3", "pp, size: 8"], 7, "Set pp.size to 3 and start 6 processes, or set pp.size to 4 and start 8"),
    (["ddp", "tp, size: 5"], 8, "Set tp.size to 2."),
    (["zero3", "tp, size: 1, sequence: true", "cp, ring: 5"], 8, "Set tp.size to 2 and cp.ring to 4."),
]


@pytest.mark.parametrize(("entries", "world", "says"), TWO_FAULTS)
def test_of_two_faults_the_remedies_agree(registry, entries, world, says):
    text = recipe(entries, TRAIN)
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text), registry, world)
    assert len(caught.value.problems) == 2
    [message] = [p.message for p in caught.value.problems if "processes" in p.message]
    assert says in message
    for changes, adds_ddp, number in proposals(message, world):
        resolve(parse(followed(yaml.safe_load(text), changes, adds_ddp)), registry, number)
