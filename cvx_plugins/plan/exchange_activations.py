"""What tokens and their gradients take inside blocks and between stages, on one rank in one step.

Blocks exchange the same when they are computed again; that comes on top of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from cvx_parallel.tensor import shares
from cvx_plugins.plan.member import Member, Sent


def of_tp(member: Member) -> Iterator[Sent]:
    """Yield what the two pairs of layers of each block take: [text, video] is summed over ranks.

    With a shared sequence only the text is; the video is gathered before a pair and summed to shares after
    it, and gathered once more for the head.
    """
    forward, backward = _passes(member)
    enter, leave = (
        2 * backward - member.starts_frozen,
        2 * forward,
    )  # sums on the way back, and on the way there
    token = member.rows * member.width * member.each
    if not member.shares_sequence:
        yield Sent("all_reduce", "tp", (leave + enter) * (member.text + member.video) * token)
        return
    video = _padded(member.video, member.size("tp")) * token
    yield Sent("all_reduce", "tp", 2 * (forward + backward) * member.text * token)
    yield Sent("all_gather", "tp", (2 * (forward + backward) + member.is_last) * video)
    yield Sent("reduce_scatter", "tp", (leave + enter) * video)


def of_cp(member: Member) -> Iterator[Sent]:
    """Yield what attention takes, and the head, for which the video is gathered."""
    yield from _of_ulysses(member)
    yield from _of_ring(member)
    video = _padded(sum(member.runs), member.size("cp")) * member.rows * member.width * member.each
    yield Sent("all_gather", "cp", member.is_last * video)


def _of_ulysses(member: Member) -> Iterator[Sent]:
    """Yield what swapping tokens for heads takes: q, k and v there, outputs back, and gradients likewise.

    A rank keeps its own heads of its own tokens. Outputs of the text are gathered, gradients summed.
    """
    ranks, place = member.size("ulysses"), member.place("ulysses")
    forward, backward = _passes(member)
    each = member.rows * member.head_width * member.each
    heads = shares(member.heads, ranks)
    first = member.place("ring") * ranks
    others = sum(member.runs[first : first + ranks]) - member.video
    tokens, results = (member.heads - heads[place]) * member.video, heads[place] * others
    words = (member.heads - heads[place]) * member.text
    there, back = 3 * tokens + results, tokens + 3 * results + words
    yield Sent("all_to_all", "ulysses", (forward * there + backward * back) * each)
    yield Sent("all_gather", "ulysses", forward * ranks * heads[0] * member.text * each)


def _of_ring(member: Member) -> Iterator[Sent]:
    """Yield what keys and values take on their way round, and in the backward pass their gradients.

    Every block passes a rank but the next rank's, which has come to its end; gradients go on from where a
    block first came to until they are where it began.
    """
    ranks, place, inner = member.size("ring"), member.place("ring"), member.size("ulysses")
    forward, backward = _passes(member)
    if member.option("recompute", "mode") == "selective":
        forward = len(member.blocks)  # what attention gave is kept
    heads = shares(member.heads, inner)[member.place("ulysses")]
    pair = 2 * member.rows * heads * member.head_width
    video = [sum(member.runs[first : first + inner]) for first in range(0, ranks * inner, inner)]
    blocks = (sum(video) - video[(place + 1) % ranks]) * pair * member.each
    gradients = (sum(video) - video[place]) * pair * max(4, member.each)
    yield Sent("send", "ring", (forward + backward) * blocks + backward * gradients)


def of_pipeline(member: Member) -> Iterator[Sent]:
    """Yield what stages send: tokens and temb on, their gradients back; and the loss, told to all ranks."""
    last = len(member.layout.stages) - 1
    times = sum((stage < last) + (stage > 0) for stage in member.stages)
    video = member.video
    if member.shares_sequence:
        video = shares(video, member.size("tp"))[member.place("tp")]
    row = (member.text + video) * member.width + int(member.passes.outline.temb.shape[1])
    yield Sent("send", "pp", times * member.rows * row * member.wide)
    yield Sent("broadcast", "pp", member.batches * max(4, member.wide))


def _passes(member: Member) -> tuple[int, int]:
    """Return how many blocks run forward in a batch, and how many backward."""
    return len(member.blocks) + len(member.recomputed), len(member.blocks)


def _padded(count: int, ranks: int) -> int:
    """Return the tokens of equal shares, together."""
    return -(-count // ranks) * ranks
