"""What ranks state before they form a group, and what is said where they differ."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from cvx_core import CvxError, Registry, resolve
from cvx_core.preflight import Facts, check, differences, facts, preflight, registry_digest, table
from cvx_core.recipe import parse
from cvx_core.world import World

ONE = Facts(0, "alpha", 100, "cpu", "3.11.7", "2.13.0", "0.1.0", "aaaa", "bbbb", "8 rows cccc")


def ranks(count, **changes):
    """Facts of `count` ranks; changes: {field: {rank: value}}."""
    everyone = []
    for rank in range(count):
        own = {name: values[rank] for name, values in changes.items() if rank in values}
        everyone.append(replace(ONE, rank=rank, pid=100 + rank, **own))
    return everyone


def test_ranks_that_are_alike_pass_and_make_a_table():
    everyone = ranks(2, host={1: "beta"})
    check(everyone)
    assert table(everyone).splitlines() == [
        "rank  host   pid  device",
        "0     alpha  100  cpu",
        "1     beta   101  cpu",
        "all: python 3.11.7, torch 2.13.0, cvx 0.1.0, registry aaaa, recipe bbbb, data 8 rows cccc",
    ]


@pytest.mark.parametrize("field", ["python", "torch", "cvx", "registry", "recipe", "data"])
def test_the_ranks_that_differ_are_named(field):
    everyone = ranks(6, **{field: {1: "x", 2: "x", 5: "y"}})
    [line] = differences(everyone)
    assert line == f"{field}: {getattr(ONE, field)!r} on ranks 0, 3-4, but 'x' on ranks 1-2, 'y' on rank 5"
    with pytest.raises(CvxError, match=f"not alike, so nothing was started. {field}: .*'y' on rank 5"):
        check(everyone)
    assert field in table(everyone).splitlines()[0]


def test_a_rank_states_versions_digests_and_its_rows():
    text = "dataset: {use: synthetic, rows: ROWS}\ntask: {use: train-autoencoder}\n"
    text += "autoencoder: {use: cogvideox-vae}\n"
    specs = [resolve(parse(text.replace("ROWS", str(rows)))) for rows in (3, 4)]
    three, four = (facts(spec, World(1, 2), torch.device("cpu")) for spec in specs)
    assert (three.rank, three.device, three.torch) == (1, "cpu", torch.__version__)
    assert three.data.startswith("3 rows ")
    assert four.data.startswith("4 rows ")
    assert three.registry == four.registry
    assert three.recipe == specs[0].digest != four.recipe


def test_a_data_set_that_one_rank_cannot_list_is_stated_as_its_error(tmp_path):
    text = f"dataset: {{use: jsonl, path: {tmp_path}/rows.jsonl}}\ntask: {{use: train-autoencoder}}\n"
    (tmp_path / "rows.jsonl").write_text("{nonsense\n")
    spec = resolve(parse(text + "autoencoder: {use: cogvideox-vae}\n"))
    assert "rows.jsonl" in facts(spec, World(), torch.device("cpu")).data


def test_the_registry_digest_changes_with_what_is_installed():
    full = Registry.discover()
    components = [component for component, _ in full.all()]
    assert registry_digest(full) == registry_digest(Registry.discover())
    assert registry_digest(Registry(components[:-1])) != registry_digest(Registry(components))


def meet(everyone, present, timeout_s=5.0):
    """Run preflight of the present ranks in threads on one store; returns what each got or raised."""
    store, results = torch.distributed.HashStore(), {}
    store.set_timeout(timedelta(seconds=10))

    def run(rank):
        try:
            results[rank] = preflight(store, everyone[rank], World(rank, len(everyone)), timeout_s)
        except CvxError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_ranks_learn_of_all(capsys):
    everyone = ranks(3)
    assert meet(everyone, range(3)) == dict.fromkeys(range(3), everyone)


def test_all_ranks_refuse_and_one_says_why(capsys):
    results = meet(ranks(3, recipe={2: "other"}), range(3))
    assert all(isinstance(result, CvxError) for result in results.values())
    said = capsys.readouterr().err
    assert said.count("recipe: 'bbbb' on ranks 0-1, but 'other' on rank 2") == 1


def test_a_rank_that_does_not_come_is_named(capsys):
    results = meet(ranks(3), [0, 2], timeout_s=0.2)
    assert all(isinstance(result, CvxError) for result in results.values())
    assert "rank 1 of 3 did not start within 0.2 s" in capsys.readouterr().err
