"""Pipeline: stages on several ranks do what one process does."""

from tests.distributed.matrix import compare_all

SCHEDULES = [
    {"schedule": "1f1b"},
    {"schedule": "gpipe", "microbatches": 3},
    {"schedule": "zero-bubble"},
    {"schedule": "interleaved"},
    {"schedule": "zero-bubble", "virtual": 2},
]


def pp(**fields):
    return {"use": "pp", **fields}


def test_every_schedule():
    variants = ["1.0-t2v", "1.5-i2v"]
    compare_all([(variant, [pp(**fields)]) for variant in variants for fields in SCHEDULES], world=2)


def test_uneven_stages():
    cases = [
        ("1.0-i2v", [pp(stages=[1, 2, 1, 3])]),
        ("2b", [pp(stages=[2, 1, 3, 1], microbatches=2)]),
        ("1.0-t2v", [pp(stages=[2, 1, 3, 1], schedule="zero-bubble")]),
    ]
    compare_all(cases, world=4, layers=7)


def test_with_data_strategies():
    data = [{"use": "ddp"}, {"use": "zero2"}, {"use": "zero3"}]
    cases = [("1.0-t2v", [pp(), strategy]) for strategy in data]
    cases += [("1.5-i2v", [pp(**fields), {"use": "zero3"}]) for fields in SCHEDULES[2:]]
    cases += [("1.5-i2v", [pp(**fields), {"use": "ddp"}]) for fields in SCHEDULES[2:]]
    compare_all(cases, world=4)
