"""The books of the cache: no block lost, none shared that should not be, and nothing found that is not equal."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from llama_stack_meta_reference.inference.kv_cache import BlockPool, blocks_for, cache_bytes

from tests.providers.meta_reference.small_llama import SMALL


def filled(pool: BlockPool, tokens: list[int], adapter: int = 0) -> list[int]:
    """A table for ``tokens``, reused as far as it can be, with every full block indexed."""
    table = pool.match(tokens, adapter)
    known = len(table)
    table += pool.allocate(blocks_for(len(tokens), pool.block_tokens) - known)
    for place in range(known, len(tokens) // pool.block_tokens):
        pool.index(table, place, tokens, adapter)
    return table


def test_a_beginning_that_is_known_is_shared_and_the_last_token_is_left_to_run() -> None:
    """A prompt that is cached whole still needs its last token run: without logits there is nothing to answer with."""
    pool = BlockPool(8, block_tokens=4)
    first = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8]) == first[:1]
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, 9]) == first
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 0, 9]) == first[:1]
    assert pool.match([0, 2, 3, 4, 5, 6, 7, 8, 9]) == []
    assert pool.match([5, 6, 7, 8, 9]) == []  # the same tokens at another place are other keys
    assert pool.free == 6


def test_an_adapter_shares_with_nobody() -> None:
    """Its keys and values of the same text differ, and an answer from the wrong ones would look plausible."""
    pool = BlockPool(8, block_tokens=4)
    tokens = [1, 2, 3, 4, 5]
    base, tuned = filled(pool, tokens), filled(pool, tokens, adapter=1)
    assert base[0] != tuned[0]
    assert pool.match(tokens) == base[:1]
    assert pool.match(tokens, 1) == tuned[:1]
    assert pool.match(tokens, 2) == []


def test_texts_of_one_hash_are_told_apart() -> None:
    """Python gives -1 and -2 one hash, and clients choose tokens: a collision must not mix up two clients' texts."""
    assert hash((0, (-1, -1))) == hash((0, (-2, -2)))
    pool = BlockPool(8, block_tokens=2)
    filled(pool, [-1, -1, 7])
    assert pool.match([-2, -2, 7]) == []


def test_equal_blocks_become_one() -> None:
    """Two that read one prompt at the same time hold its blocks twice only until they are full."""
    pool = BlockPool(8, block_tokens=4)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second = pool.allocate(2), pool.allocate(2)
    for place in range(2):
        pool.index(first, place, tokens)
    for place in range(2):
        pool.index(second, place, tokens)
    assert first == second
    assert pool.free == 6
    pool.release(first)
    assert pool.free == 6
    pool.release(second)
    assert pool.free == 8


def test_those_left_alone_the_longest_go_first_and_ends_before_beginnings() -> None:
    """A beginning that is in use often stays; an end without its beginning could not be found any more."""
    pool = BlockPool(4, block_tokens=2)
    old, new = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([1, 2, 3, 4, 9]))  # used again
    taken = pool.allocate(1)
    assert pool.match([5, 6, 7, 8, 9]) == [3 - 1]
    assert taken == [3]
    taken += pool.allocate(1)
    assert len(pool.match([1, 2, 3, 4, 9])) == 1


def test_what_is_forgotten_is_found_by_nobody() -> None:
    """After logits that are no numbers its keys are suspect, while those that hold the blocks may go on."""
    pool = BlockPool(4, block_tokens=2)
    tokens = [1, 2, 3, 4, 5]
    table = filled(pool, tokens)
    other = pool.match(tokens)
    pool.forget(table)
    assert pool.match(tokens) == []
    pool.release(table)
    assert (pool.free, pool.cached) == (2, 0)
    pool.release(other)
    assert (pool.free, pool.cached) == (4, 0)


def test_after_a_blanked_memory_nothing_is_found() -> None:
    """The runner's ``reset`` zeroes what the index still describes."""
    pool = BlockPool(4, block_tokens=2)
    pool.release(filled(pool, [1, 2, 3, 4]))
    pool.clear()
    assert pool.match([1, 2, 3, 4, 5]) == []
    assert pool.free == 4


def test_more_than_is_free_is_not_given() -> None:
    """The scheduler asks ``free`` first: a table that is too short would write over another sequence."""
    pool = BlockPool(2)
    pool.allocate(2)
    with pytest.raises(RuntimeError, match="1 cache blocks asked for, 0 of 2 are free"):
        pool.allocate(1)


@pytest.mark.parametrize("seed", range(50))
def test_the_books_balance_whatever_happens(seed: int) -> None:
    """400 random arrivals, growths and departures over few texts, checked against a model that keeps whole texts.

    Each block's text is what its holders think it is; references are exact; in the end all is free.
    """
    draw = random.Random(seed)
    size = draw.choice((1, 2, 4))
    pool = BlockPool(draw.randint(4, 20), size)
    holds: dict[int, tuple[int, tuple[int, ...]]] = {}  # by block: whose, and its whole text from the beginning
    alive: list[tuple[list[int], list[int], int]] = []
    hits = 0
    for _ in range(400):
        event = draw.random()
        if event < 0.5:
            tokens, adapter = [draw.randrange(2) for _ in range(draw.randint(1, 5 * size))], draw.randrange(2)
            table = pool.match(tokens, adapter)
            hits += len(table)
            assert len(table) * size < len(tokens)
            for place, block in enumerate(table):
                assert holds[block] == (adapter, tuple(tokens[: (place + 1) * size]))
            missing = blocks_for(len(tokens), size) - len(table)
            if missing > pool.free:
                pool.release(table)
                continue
            known = len(table)
            table += pool.allocate(missing)
            for place in range(known, len(tokens) // size):
                holds[table[place]] = (adapter, tuple(tokens[: (place + 1) * size]))
                pool.index(table, place, tokens, adapter)
                assert holds[table[place]] == (adapter, tuple(tokens[: (place + 1) * size]))
            alive.append((table, tokens, adapter))
        elif event < 0.9 and alive:
            pool.release(alive.pop(draw.randrange(len(alive)))[0])
        elif event < 0.95 and alive:
            pool.forget(draw.choice(alive)[0])
        held = Counter(block for table, _, _ in alive for block in table)
        assert pool.free == pool.blocks - len(held)
        assert all(pool._references[block] == held[block] for block in range(pool.blocks))
    for table, _, _ in alive:
        pool.release(table)
    assert pool.free == pool.blocks
    assert hits


def test_cache_bytes_are_those_of_keys_and_values() -> None:
    """The plan is what an operator decides by: 2 (keys and values) x layers x key heads x width x bytes of a number."""
    assert cache_bytes(SMALL, 7, torch.float32) == 2 * 2 * 2 * 8 * 4 * 7


@pytest.mark.parametrize(("blocks", "block_tokens"), [(0, 16), (3, 0)])
def test_a_pool_of_nothing_is_refused(blocks: int, block_tokens: int) -> None:
    """It would serve nobody, for ever."""
    with pytest.raises(ValueError, match="at least 1 block"):
        BlockPool(blocks, block_tokens)
