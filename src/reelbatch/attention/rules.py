"""Rules: which tokens a head attends to, by where they are in the video.

A rule is a function of the coordinates of queries and keys. It is compiled once per shape into blocks of tokens, and
blocks that are masked altogether are not computed.

    rules = HeadRules({range(0, 12): own_frame, range(12, 24): own_pixel})
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from reelbatch.tracing import cached

BLOCK = 128
"""Tokens on a side of a block; FlexAttention's own default."""
MERGED = 8
"""Blocks of queries in one call at most, where it needs a mask; that has so many blocks times all keys."""


class Tokens(NamedTuple):
    """Coordinates of tokens, in patches (int32). Text tokens have -1 everywhere, and `is_text`.

    Rules get queries as `[…, queries, 1]` and keys as `[…, 1, keys]`, or single tokens: write them with operators.
    """

    frame: Tensor
    row: Tensor
    column: Tensor
    is_text: Tensor

    def at(self, index: Tensor) -> Tokens:
        return Tokens(*(coordinate[index] for coordinate in self))

    def as_queries(self) -> Tokens:
        return Tokens(*(coordinate[:, None] for coordinate in self))


Rule = Callable[[Tokens, Tokens], Tensor]
"""Coordinates of queries and of keys to a boolean: whether the one may attend to the other."""


def _touches_text(query: Tokens, key: Tokens) -> Tensor:
    return query.is_text | key.is_text


def own_frame(query: Tokens, key: Tokens) -> Tensor:
    """A video token sees its own frame and the text; text sees everything."""
    return (query.frame == key.frame) | _touches_text(query, key)


def own_pixel(query: Tokens, key: Tokens) -> Tensor:
    """A video token sees its own place in every frame and the text; text sees everything."""
    return ((query.row == key.row) & (query.column == key.column)) | _touches_text(query, key)


@dataclass(frozen=True)
class SlidingTile:
    """A video token sees the tiles around its own and the text; text sees everything (Sliding Tile Attention, 2025).

    frames, rows, columns: size of a tile in patches. reach: tiles to either side along each axis.
    """

    frames: int
    rows: int
    columns: int
    reach: int = 1

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        near = _touches_text(query, key)
        within = torch.ones_like(near)
        for q, k, size in zip(query[:3], key[:3], (self.frames, self.rows, self.columns), strict=True):
            tile, other = q // size, k // size
            within = within & (other >= tile - self.reach) & (other <= tile + self.reach)
        return within | near


class HeadRules:
    """The rule of each head; a head that is not named attends to everything. Hashable, and the same if built alike.

    Args:
        rules: heads (a number, or several, as a range or a tuple) to their rule. Rules are functions, or objects that
            compare by value; a new lambda each time is a new rule each time.

    Raises:
        ValueError: if a head is named twice or is negative.
    """

    def __init__(self, rules: Mapping[int | Iterable[int], Rule]) -> None:
        named = [((heads,) if isinstance(heads, int) else tuple(heads), rule) for heads, rule in rules.items()]
        heads = [head for group, _ in named for head in group]
        twice = sorted({head for head in heads if heads.count(head) > 1})
        if twice or any(head < 0 for head in heads):
            raise ValueError(f"Each head has one rule, and heads count from 0; wrong are {twice or min(heads)}.")
        self.groups: tuple[tuple[tuple[int, ...], Rule], ...] = tuple(named)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadRules) and self.groups == other.groups

    def __hash__(self) -> int:
        return hash(self.groups)

    def of_head(self, heads: int) -> list[Rule | None]:
        """The rule of each of `heads` heads; None is "everything"."""
        chosen: list[Rule | None] = [None] * heads
        for group, rule in self.groups:
            for head in group:
                if head >= heads:
                    raise ValueError(f"A rule is given for head {head}, but there are {heads}: 0 to {heads - 1}.")
                chosen[head] = rule
        return chosen


# --------------------------------------------------------------------------------------------------
# Names for rules, so that a request can ask for one


def _spatial_temporal(heads: int) -> HeadRules:
    return HeadRules({range(heads // 2): own_frame, range(heads // 2, heads): own_pixel})


_REGISTERED: dict[str, Callable[[int], HeadRules]] = {
    "own-frame": lambda heads: HeadRules({range(heads): own_frame}),
    "spatial-temporal": _spatial_temporal,
    "sliding-tile": lambda heads: HeadRules({range(heads): SlidingTile(frames=2, rows=8, columns=8)}),
}


def register_rule(name: str, make: Callable[[int], HeadRules]) -> None:
    """Gives a rule a name, which a request can ask for (`attention_rule`).

    Args:
        make: the number of heads to the rules of the heads.
    """
    _REGISTERED[name] = make


def rule_names() -> tuple[str, ...]:
    return tuple(sorted(_REGISTERED))


def rule_named(name: str, heads: int) -> HeadRules:
    """The rules registered under a name, for so many heads.

    Raises:
        KeyError: for a name that nobody registered, with the nearest one.
    """
    if name not in _REGISTERED:
        near = difflib.get_close_matches(name, _REGISTERED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"registered are {', '.join(rule_names())}"
        raise KeyError(f"no attention rule is named {name!r}; {hint}")
    return _REGISTERED[name](heads)


# --------------------------------------------------------------------------------------------------
# Compiled to blocks


class Span(NamedTuple):
    """Tokens of some blocks."""

    blocks: Int[Tensor, " blocks"] | None
    """None is all blocks."""
    tokens: int
    """How many: the last block may be short."""


class Call(NamedTuple):
    """One dense attention of some heads' queries over the keys that they may see at all."""

    heads: Int[Tensor, " heads"]
    queries: Span
    keys: Span
    rule: Rule | None
    """Set where it has to be asked pair by pair; None is that all of these pairs may attend."""


@dataclass(frozen=True, eq=False)
class RuleMask:
    """The rules of one sample, compiled for its shape.

    Attributes:
        tokens: coordinates of the joint sequence, video then text.
        rules: the different rules; None is "everything". of_head: for each head, its place in `rules`.
        some, every: `[rules, blocks, blocks]`, whether some and whether every pair of tokens of a block is allowed.
    """

    tokens: Tokens
    rules: tuple[Rule | None, ...]
    of_head: tuple[int, ...]
    some: Bool[Tensor, "rules blocks blocks"]
    every: Bool[Tensor, "rules blocks blocks"]

    def __len__(self) -> int:
        return len(self.tokens.frame)

    @property
    def masked(self) -> float:
        """Share of blocks, over all heads, that are not computed."""
        return 1 - self.some[list(self.of_head)].float().mean().item()

    @cached_property
    @torch.inference_mode(False)
    def calls(self) -> tuple[Call, ...]:
        """The attention as dense calls: query blocks that see the same key blocks make one."""
        return tuple(call for rule in range(len(self.rules)) for call in self._calls(rule))

    def _calls(self, rule: int) -> Iterator[Call]:
        heads = torch.tensor([head for head, of in enumerate(self.of_head) if of == rule], device=self.some.device)
        some, every = self.some[rule].cpu(), self.every[rule].cpu()
        asked = (some & ~every).any(-1).tolist()
        alike: dict[tuple[bool, tuple[bool, ...]], list[int]] = {}
        for block, seen in enumerate(some.tolist()):
            alike.setdefault((asked[block], tuple(seen)), []).append(block)
        for (ask, seen), blocks in alike.items():
            keys = self._span([block for block, sees in enumerate(seen) if sees])
            step = MERGED if ask else len(blocks)
            for first in range(0, len(blocks), step):
                yield Call(heads, self._span(blocks[first : first + step]), keys, self.rules[rule] if ask else None)

    def _span(self, blocks: list[int]) -> Span:
        if len(blocks) == self.some.shape[-1]:
            return Span(None, len(self))
        beyond = (blocks[-1] + 1) * BLOCK - len(self)
        return Span(torch.tensor(blocks, device=self.some.device), len(blocks) * BLOCK - max(beyond, 0))

    def places(self, span: Span) -> Int[Tensor, " tokens"]:
        """Places of a span's tokens. Computed when needed: those of all calls together grow with the tokens' square."""
        if span.blocks is None:
            return torch.arange(span.tokens, device=self.some.device)
        places = torch.arange(BLOCK, device=self.some.device)
        return (span.blocks[:, None] * BLOCK + places).flatten()[: span.tokens]

    def allowed(self, call: Call) -> Bool[Tensor, "queries keys"] | None:
        """The mask of a call, computed when needed too; None if all of its pairs may attend."""
        if call.rule is None:
            return None
        return _evaluate(call.rule, self.tokens, self.places(call.queries), self.places(call.keys))

    @cached_property
    @torch.inference_mode(False)
    def block_mask(self) -> BlockMask:
        """For FlexAttention, over the sample's bucket of rows."""
        rows = bucket(len(self))
        of_head = torch.tensor(self.of_head, device=self.some.device)
        tokens = Tokens(*(pad(coordinate, (0, rows - len(self))) for coordinate in self.tokens))
        real, rules = _real(len(self), self.some.device), self.rules

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            q, k, chosen = tokens.at(query), tokens.at(key), of_head[head]
            both = real[query] & real[key]
            may = query < 0
            for place, rule in enumerate(rules):
                may = may | ((chosen == place) & (rule(q, k) if rule is not None else both))
            return may & both

        heads = of_head if len(rules) > 1 else of_head[:1]  # one table serves all heads that have one rule
        return _block_mask(self.some[heads], self.every[heads], len(self), len(self), allowed)


def bucket(tokens: int) -> int:
    """Rows that FlexAttention is compiled for: whole blocks, and at most an eighth more of them than there are."""
    blocks = -(-tokens // BLOCK)
    step = 1 << max(blocks.bit_length() - 4, 0)
    return -(-blocks // step) * step * BLOCK


@cached(maxsize=16)
@torch.inference_mode(False)
def unrestricted(queries: int, keys: int, device: torch.device) -> BlockMask:
    """The block mask, over buckets of rows, with which every query may attend to every key."""
    real_query, real_key = _real(queries, device), _real(keys, device)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return real_query[query] & real_key[key]

    every = torch.ones(1, -(-queries // BLOCK), -(-keys // BLOCK), dtype=torch.bool, device=device)
    return _block_mask(every, every.clone(), queries, keys, allowed)


def _real(count: int, device: torch.device) -> Bool[Tensor, " rows"]:
    """Which rows of a bucket are a sample's own."""
    return torch.arange(bucket(count), device=device) < count


def _block_mask(
    some: Bool[Tensor, "heads query_blocks key_blocks"],
    every: Bool[Tensor, "heads query_blocks key_blocks"],
    queries: int,
    keys: int,
    allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> BlockMask:
    """Tables of blocks (`every` is changed, so it must be a fresh one) as FlexAttention reads them."""
    if queries % BLOCK:  # a block that reaches beyond the last token is never full
        every[:, -1] = False
    if keys % BLOCK:
        every[:, :, -1] = False
    beyond = (0, bucket(keys) // BLOCK - some.shape[2], 0, bucket(queries) // BLOCK - some.shape[1])
    some, every = (pad(table, beyond)[None] for table in (some, every))
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(bucket(queries), bucket(keys)),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are set, and their places first: what FlexAttention reads."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _evaluate(rule: Rule | None, tokens: Tokens, queries: Tensor, keys: Tensor) -> Tensor:
    if rule is None:
        return torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    return rule(tokens.at(queries).as_queries(), tokens.at(keys)).expand(len(queries), len(keys))


def coordinates(grid: tuple[int, int, int], text: int, device: torch.device) -> Tokens:
    """Coordinates of a sample's joint sequence: patches frame by frame, row by row, then so many text tokens."""
    axes = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.int32) for size in grid), indexing="ij")
    frame, row, column = (pad(axis.flatten(), (0, text), value=-1) for axis in axes)
    return Tokens(frame, row, column, frame < 0)


@cached(maxsize=16)
@torch.inference_mode(False)  # what is kept may serve training next
def compile_rules(
    rules: HeadRules, heads: int, grid: tuple[int, int, int], text: int, device: torch.device
) -> RuleMask | None:
    """Rules prepared for a shape: once, for all layers and steps. None if they mask nothing.

    It goes row by row of blocks, so no tensor has a value for every pair of tokens; the tables have one for
    every pair of blocks (1.7 MB a rule for 118,000 tokens).

    Args:
        grid: patches along frame, row and column. text: text tokens after them.
    """
    tokens = coordinates(grid, text, device)
    chosen = rules.of_head(heads)
    different = tuple(dict.fromkeys(chosen))
    tables = [_block_tables(rule, tokens) for rule in different]
    some, every = (torch.stack([table[which] for table in tables]) for which in (0, 1))
    if every.all():
        return None
    return RuleMask(tokens, different, tuple(different.index(rule) for rule in chosen), some, every)


def _block_tables(rule: Rule | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """For each block of queries and of keys, whether some and whether every pair of tokens is allowed."""
    count, device = len(tokens.frame), tokens.frame.device
    blocks = -(-count // BLOCK)
    keys = torch.arange(count, device=device)
    some = torch.empty(blocks, blocks, dtype=torch.bool, device=device)
    every = torch.empty_like(some)
    for block, queries in enumerate(keys.split(BLOCK)):
        allowed = _evaluate(rule, tokens, queries, keys)
        if not allowed.any(-1).all():
            raise ValueError(f"The rule {rule} leaves some tokens nothing to attend to; let each see at least itself.")
        for table, reduce, beyond in ((some, torch.any, False), (every, torch.all, True)):
            padded = pad(allowed, (0, blocks * BLOCK - count), value=beyond)
            table[block] = reduce(reduce(padded, 0).view(blocks, BLOCK), -1)
    return some, every
