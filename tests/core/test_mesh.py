"""The mesh: degrees that multiply out, coordinates of ranks, proposals, and groups of big worlds."""

import math

import pytest
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cvx_core.mesh import AXES, DATA, JOINED, SEVERAL, Degrees, Mesh, MeshError, Request, solve
from cvx_core.proposals import knobs, nearest, proposed, said

SIZES = st.sampled_from([1, 1, 2, 3, 4])
WORLDS = st.dictionaries(st.sampled_from(AXES), SIZES, max_size=5).map(Degrees)


def ddp(size=None):
    return Request("ddp", {"dp_shard": 1, "dp_replicate": size})


def zero3(size=None):
    return Request("zero3", {"dp_replicate": 1, "dp_shard": size})


def one(name, size):
    return Request(name, {name: size})


def cp(ring, ulysses):
    fields = {"ring": ("ring",), "ulysses": ("ulysses",)}
    return Request("cp", {"ring": ring, "ulysses": ulysses}, fields)


def layerzero(size=None, group=None, usual=8):
    """Data ranks in groups, as the strategy asks for them."""
    inside = group or (usual if size is None else min(usual, size))
    degrees = {"dp_shard": inside, "dp_replicate": None if size is None else size // inside}
    fields = {"zero3_size": ("dp_shard",), "size": ("dp_replicate", "dp_shard")}
    return Request("layerzero", degrees, fields, {} if group else {"dp_shard": usual})


def refused(requests, world, limits=()):
    with pytest.raises(MeshError) as caught:
        solve(requests, world, limits)
    return str(caught.value), caught.value.owner


def refusal_of(requests, world, limits):
    try:
        solve(requests, world, limits)
    except MeshError as error:
        return str(error)
    return ""


def followed(requests, changes):
    """Return requests as they are once a recipe states other sizes. changes: {label: size}."""
    made = []
    for request in requests:
        own = {label: size for label, size in changes.items() if label.split(".")[0] == request.name}
        if request.name == "layerzero":
            sizes = {knob.label: knob for knob in knobs([request])}
            group = None if request.usual else sizes["layerzero.zero3_size"].size
            size = own.get("layerzero.size", sizes["layerzero.size"].size)
            group = own.get("layerzero.zero3_size", group)
            assert size is None or size % (group or min(8, size)) == 0, "its own check refuses that"
            made.append(layerzero(size, group))
        else:
            degrees = {**request.degrees}
            for label, size in own.items():
                axis = label.split(".")[-1]
                degrees[axis if axis in degrees else list(degrees)[-1]] = size
            made.append(Request(request.name, degrees, request.fields))
    return made


@st.composite
def requested(draw):
    """Requests for any axes: one strategy each, those of the data axes kept apart or together, some open."""
    requests = [one(axis, draw(SIZES)) for axis in ("pp", "tp", "cfg") if draw(st.booleans())]
    if draw(st.booleans()):
        requests.append(cp(draw(SIZES), draw(SIZES)))
    size = draw(st.one_of(st.none(), SIZES))
    group = draw(st.one_of(st.none(), SIZES))
    grouped = layerzero(size * (group or 1) if size else None, group)
    data = {"ddp": [ddp(size)], "zero3": [zero3(size)], "layerzero": [grouped], "": []}
    return requests + data[draw(st.sampled_from(list(data)))]


RANGES = st.builds(lambda least, more: range(least, least + more), st.integers(1, 3), st.integers(1, 4))
LIMITS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["pp", "tp", "ring", "ulysses", "dp_shard"]), RANGES),
        st.tuples(st.sampled_from(["cp", "model"]), st.just(SEVERAL)),
    ),
    max_size=3,
)


@given(requested(), st.integers(1, 64))
def test_what_is_solved_multiplies_out_and_keeps_what_was_asked(requests, world):
    try:
        degrees = solve(requests, world)
    except MeshError:
        return
    assert degrees.world == world
    for request in requests:
        for axis, size in request.degrees.items():
            assert size is None or degrees.size(axis) == size or axis in request.usual


@given(requested(), st.integers(1, 64))
def test_what_is_proposed_is_a_mesh_and_what_fits_is_left_alone(requests, world):
    proposed = nearest(requests, world)
    assert proposed.world == world
    try:
        degrees = solve(requests, world)
    except MeshError as error:
        said = str(error)
    else:
        assert all(proposed.size(axis) == degrees.size(axis) for axis in AXES)
        return
    assert f"{world} processes" in said
    assert "Set " in said or "`- {use: ddp}`" in said or "[{use: ddp}]" in said


@settings(deadline=None)
@given(requested(), st.integers(1, 40), LIMITS)
@example([], 2, [])
def test_what_is_proposed_passes_when_it_is_followed(requests, world, limits):
    refusal = refusal_of(requests, world, limits)
    ways = proposed(requests, world, limits) if refusal else []
    if requests:  # a recipe without strategies is told the same in words of its own
        assert said(ways, world) in refusal or not refusal
    for way in ways:
        assert way.changes or way.adds_ddp or way.world != world
        changes = {knob.label: size for knob, size in way.changes.items()}
        assert all(knob.size != size for knob, size in way.changes.items() if knob.usual is None)
        then = [*followed(requests, changes), *([ddp()] if way.adds_ddp else [])]
        assert solve(then, way.world).keeps(limits), (way, said(ways, world))


@settings(deadline=None)
@given(requested(), st.integers(1, 40), LIMITS)
def test_where_nothing_is_proposed_for_these_ranks_there_is_no_mesh_of_them(requests, world, limits):
    axes = [axis for r in requests for axis in r.degrees if axis not in r.kept]
    axes += [] if any(axis in DATA for r in requests for axis in r.degrees) else ["dp_replicate"]
    some = [dict(zip(axes, sizes, strict=True)) for sizes in divided(world, len(axes))]
    assert (nearest(requests, world, limits) is None) == (not any(Degrees(s).keeps(limits) for s in some))


def divided(number, parts):
    """Return all ways to write a number as a product."""
    if parts == 0:
        return [()] if number == 1 else []
    sizes = [n for n in range(1, number + 1) if number % n == 0]
    return [(size, *rest) for size in sizes for rest in divided(number // size, parts - 1)]


@given(requested(), st.integers(1, 48))
def test_no_mesh_changes_fewer_sizes_than_the_one_proposed(requests, world):
    wanted = {axis: size for r in requests for axis, size in r.degrees.items() if size is not None}
    kept = {axis for r in requests for axis in r.kept}
    if any(r.name == "layerzero" for r in requests):
        return  # of its sizes, one is a product
    changed = [
        axis for axis, size in nearest(requests, world).sizes.items() if wanted.get(axis, size) != size
    ]
    free = not any(axis in DATA for r in requests for axis in r.degrees) or None in (
        size for r in requests for size in r.degrees.values()
    )
    if len(changed) <= 1:
        return
    for axis in wanted.keys() - kept:  # then no single change would have done
        rest = math.prod(size for other, size in wanted.items() if other != axis)
        assert world % rest if free else not any(rest * size == world for size in range(1, world + 1))


@given(WORLDS)
def test_coordinates_are_a_bijection(degrees):
    seen = {tuple(degrees.coordinate(rank, axis) for axis in AXES) for rank in range(degrees.world)}
    assert len(seen) == degrees.world
    assert all(place[i] < degrees.size(axis) for place in seen for i, axis in enumerate(AXES))


@given(WORLDS, st.sampled_from(list(JOINED)))
def test_joined_axes_are_their_product_and_count_the_outer_one_first(degrees, joined):
    assert degrees.size(joined) == math.prod(degrees.size(axis) for axis in JOINED[joined])
    for rank in range(degrees.world):
        place = 0
        for axis in JOINED[joined]:
            place = place * degrees.size(axis) + degrees.coordinate(rank, axis)
        assert degrees.coordinate(rank, joined) == place


def test_the_last_axis_is_the_innermost():
    degrees = Degrees({"pp": 2, "dp_shard": 2, "tp": 2})
    assert [degrees.coordinate(rank, "tp") for rank in range(8)] == [0, 1] * 4
    assert [degrees.coordinate(rank, "pp") for rank in range(8)] == [0] * 4 + [1] * 4
    assert str(degrees) == "pp 2 x dp_shard 2 x tp 2 = 8 processes"
    assert str(Degrees({"tp": 1})) == "one process"


def test_auto_takes_what_is_left():
    assert solve([one("tp", 2), ddp()], 8).sizes == {"tp": 2, "dp_shard": 1, "dp_replicate": 4}
    assert solve([one("tp", 8), ddp()], 8).size("dp_replicate") == 1
    assert solve([], 1).world == 1


@pytest.mark.parametrize(
    ("requests", "world", "says", "owner"),
    [
        (
            [],
            2,
            "nothing says how 2 processes share the work. Add `parallel: [{use: ddp}]`, or start one",
            None,
        ),
        ([ddp(3)], 8, "ddp 3, but there are 8 processes. Set ddp to 8, or start 3 processes.", 0),
        (
            [one("tp", 2)],
            8,
            "tp 2, but there are 8 processes. Add `- {use: ddp}`, or start 2 processes.",
            None,
        ),
        ([one("pp", 2), one("tp", 3)], 8, "pp 2 x tp 3 = 6, but there are 8 processes. Set tp to 4, or", 1),
        ([one("pp", 3), one("tp", 3)], 8, "Set pp to 2 and tp to 4, or start 9 processes.", None),
        ([one("tp", 3), zero3()], 8, "nothing whole is left for zero3. Set tp to 4, or start 6 or 9 proc", 0),
        ([one("tp", 3), zero3()], 2, "Set tp to 2, or start 3 processes.", 0),
        ([zero3(2), one("tp", 2)], 6, "zero3 2 x tp 2 = 4, but there are 6 processes. Set zero3 to 3, or", 0),
        (
            [cp(2, 2)],
            6,
            "cp.ring 2 x cp.ulysses 2 = 4, but there are 6 processes. Set cp.ulysses to 3, or",
            0,
        ),
        (
            [layerzero(group=3)],
            8,
            "layerzero.zero3_size 3, which does not divide 8 processes. Set layerzero.zero3_size to 4, or "
            "start 6 or 9 processes.",
            0,
        ),
        (
            [layerzero()],
            12,
            "zero3_size 8, which does not divide 12 processes. Set layerzero.zero3_size to 6",
            0,
        ),
        (
            [layerzero(size=8, group=4), one("tp", 2)],
            12,
            "layerzero 8 x tp 2 = 16, but there are 12 processes. Set layerzero.zero3_size to 3 and "
            "layerzero.size to 6, or start 16 processes.",
            0,
        ),
        (
            [layerzero(), one("tp", 3)],
            8,
            "tp 3, which does not divide 8 processes, so nothing whole is left for layerzero. Set tp to 4, "
            "or start 6 or 9 processes.",
            1,
        ),
    ],
)
def test_what_does_not_multiply_out_is_refused_with_the_nearest_mesh(requests, world, says, owner):
    message, at = refused(requests, world)
    assert says in message
    assert at == owner


@pytest.mark.parametrize(
    ("requests", "world", "limits", "says", "owner"),
    [
        ([ddp(), one("tp", 3)], 8, [("tp", range(1, 4))], "ddp. Set tp to 2, or start 6 or 9 processes.", 1),
        (
            [one("pp", 3)],
            10,
            [("pp", (3,))],
            "there are 10 processes. Start 3 processes, or add `- {use: ddp}` and start 9 or 12 processes.",
            None,
        ),
        ([ddp(), one("pp", 3)], 8, [("pp", (3,))], "left for ddp. Start 6 or 9 processes.", 1),
        ([zero3(), one("pp", 8)], 12, [("pp", range(2, 5))], "left for zero3. Set pp to 4.", 1),
        (
            [zero3(), one("pp", 8)],
            7,
            [("pp", range(2, 5))],
            "left for zero3. Set pp to 3 and start 6 processes, or set pp to 4 and start 8 processes.",
            1,
        ),
        ([cp(2, 1)], 3, [("cp", SEVERAL)], "cp.ring 2, but there are 3 processes. Set cp.ring to 3, or", 0),
        ([one("tp", 2)], 3, [("tp", range(0))], "Nothing fits: no sizes of these strategies", 0),
    ],
)
def test_what_is_proposed_keeps_to_limits(requests, world, limits, says, owner):
    message, at = refused(requests, world, limits)
    assert says in message
    assert at == owner


@pytest.mark.parametrize(("world", "group"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8)])
def test_a_usual_size_is_no_more_than_the_ranks_that_are_left(world, group):
    assert solve([layerzero()], world).size("dp_shard") == group
    assert solve([layerzero(), one("tp", 3)], 3 * world).size("dp_shard") == group
    assert solve([layerzero(size=world)], world).size("dp_shard") == group


@pytest.mark.parametrize(
    ("requests", "says", "owner"),
    [
        ([one("tp", 0)], "'tp' asks for 0 ranks along tp. Give 1 or more.", 0),
        ([one("tp", 2), one("sp", 2)], "'sp' asks for axis 'sp'; a mesh has cfg, pp,", 1),
        ([ddp(), zero3()], "'zero3' and 'ddp' both own axis dp_replicate. Keep one.", 1),
        ([ddp(), one("tp", 2), ddp()], "'ddp' is given twice. Keep one.", 2),
        ([one("tp", None), ddp()], "'ddp' and 'tp' both take what is left of the ranks (size: auto).", 1),
    ],
)
def test_what_no_number_of_ranks_makes_right_is_refused(requests, says, owner):
    for world in (1, 8):
        message, at = refused(requests, world)
        assert says in message
        assert at == owner


@pytest.fixture
def fake():
    """Make this process a rank of a large world; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank, world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "rank"), [(64, 0), (64, 37), (1024, 1023)])
def test_slices_of_big_worlds_are_the_ranks_that_coordinates_say(fake, world, rank):
    fake(rank, world)
    requests = [one("pp", 2), one("tp", 4), Request("cp", {"ring": 2, "ulysses": 2}), ddp()]
    mesh = Mesh(solve(requests, world), rank)
    for axis in (*AXES, *JOINED):
        names = JOINED.get(axis, (axis,))
        others = [other for other in AXES if other not in names]
        mine = [mesh.degrees.coordinate(rank, other) for other in others]
        expected = [r for r in range(world) if [mesh.degrees.coordinate(r, o) for o in others] == mine]
        group = mesh.group(axis)
        assert (group is None) == (len(expected) == 1)
        if group is not None:
            assert dist.get_process_group_ranks(group) == expected
            assert dist.get_rank(group) == mesh.place(axis)
            assert mesh.along(axis).size() == mesh.size(axis) == len(expected)
    both = mesh.along("dp_replicate", "tp")
    assert tuple(both.shape) == (mesh.size("dp_replicate"), 4)
    assert both.mesh_dim_names == ("dp_replicate", "tp")
    assert mesh.along("dp_replicate", "tp") is both, "slices are made once"


def test_alone_there_are_no_groups():
    mesh = Mesh(solve([], 1))
    assert all(mesh.group(axis) is None and mesh.place(axis) == 0 for axis in (*AXES, *JOINED))
    mesh.barrier()
    assert mesh.is_first
