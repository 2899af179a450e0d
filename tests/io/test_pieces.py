"""Tensors as pieces: cut and joined they are the same; pieces that do not make up a tensor are refused."""

import pytest
import torch

from cvx_core import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_io import pieces as module
from cvx_io.pieces import ByPieces, pieces, rows, side_by_side

WHOLE = torch.arange(24).reshape(6, 4)
INDEX = {"a": TensorInfo((6, 4), "int64")}


@pytest.mark.parametrize("cut", [1, 2, 4, 6])
@pytest.mark.parametrize(("begin", "end"), [(0, 6), (1, 5), (2, 3), (3, 3)])
def test_rows_of_pieces_are_rows_of_the_whole(cut, begin, end):
    found = list(rows(WHOLE.split(cut), begin, end))
    assert torch.equal(torch.cat([WHOLE[:0], *found]), WHOLE[begin:end])
    assert all(piece.untyped_storage().data_ptr() == WHOLE.data_ptr() for piece in found)


def test_a_tensor_of_one_piece_is_not_copied_and_one_of_several_is_joined():
    whole = Tensors(INDEX, ByPieces(INDEX, lambda name: [WHOLE]))
    assert whole.load("a") is WHOLE
    cut = Tensors(INDEX, ByPieces(INDEX, lambda name: iter(WHOLE.split(4))))
    assert torch.equal(cut.load("a"), WHOLE)
    assert [len(piece) for piece in pieces(cut, "a")] == [4, 2]


def test_any_other_load_gives_one_piece():
    (piece,) = pieces(Tensors(INDEX, lambda name: WHOLE), "a")
    assert piece is WHOLE


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([WHOLE[:5]], "is 5 rows long"),
        ([WHOLE, WHOLE[:1]], r"shape=\(1, 4\)"),
        ([WHOLE[:, :3]], r"shape=\(6, 3\)"),
        ([WHOLE.flatten()], r"shape=\(24,\)"),
        ([WHOLE.int()], "int32"),
        ([], "is 0 rows long"),
    ],
)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(found, told):
    source = Tensors(INDEX, ByPieces(INDEX, lambda name: found))
    with pytest.raises(FormatError, match=r"'a' is.* announced .*\(6, 4\)") as raised:
        source.load("a")
    assert raised.match(told)


def test_joined_side_by_side_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2 * 4 * 8)  # two rows
    found = list(side_by_side(WHOLE.chunk(2, dim=1)))
    assert [tuple(piece.shape) for piece in found] == [(2, 4)] * 3
    assert torch.equal(torch.cat(found), WHOLE)
