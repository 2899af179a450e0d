"""The mesh: degrees that multiply out, coordinates of ranks, proposals, and groups of big worlds."""

import math

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cvx_core.mesh import AXES, DATA, JOINED, Degrees, Mesh, MeshError, Request, nearest, solve

SIZES = st.sampled_from([1, 1, 2, 3, 4])
WORLDS = st.dictionaries(st.sampled_from(AXES), SIZES, max_size=5).map(Degrees)


def ddp(size=None):
    return Request("ddp", {"dp_shard": 1, "dp_replicate": size})


def zero3(size=None):
    return Request("zero3", {"dp_replicate": 1, "dp_shard": size})


def one(name, size):
    return Request(name, {name: size})


def refused(requests, world):
    with pytest.raises(MeshError) as caught:
        solve(requests, world)
    return str(caught.value), caught.value.owner


@st.composite
def requested(draw):
    """Requests for any axes: one strategy each, those of the data axes kept apart or together, some open."""
    requests = [one(axis, draw(SIZES)) for axis in ("pp", "tp", "cfg") if draw(st.booleans())]
    if draw(st.booleans()):
        requests.append(Request("cp", {"ring": draw(SIZES), "ulysses": draw(SIZES)}))
    size = draw(st.one_of(st.none(), SIZES))
    data = {"ddp": ddp(size), "zero3": zero3(size), "layerzero": None, "": None}
    name = draw(st.sampled_from(list(data)))
    both = Request("layerzero", {"dp_shard": draw(SIZES), "dp_replicate": size})
    return requests + {"": [], "layerzero": [both]}.get(name, [data[name]])


@given(requested(), st.integers(1, 64))
def test_what_is_solved_multiplies_out_and_keeps_what_was_asked(requests, world):
    try:
        degrees = solve(requests, world)
    except MeshError:
        return
    assert degrees.world == world
    for request in requests:
        for axis, size in request.degrees.items():
            assert size is None or degrees.size(axis) == size


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


@given(requested(), st.integers(1, 48))
def test_no_mesh_changes_fewer_sizes_than_the_one_proposed(requests, world):
    wanted = {axis: size for r in requests for axis, size in r.degrees.items() if size is not None}
    kept = {axis for r in requests for axis in list(r.degrees)[:-1] if axis in DATA and r.degrees[axis] == 1}
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
    ],
)
def test_what_does_not_multiply_out_is_refused_with_the_nearest_mesh(requests, world, says, owner):
    message, at = refused(requests, world)
    assert says in message
    assert at == owner


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
