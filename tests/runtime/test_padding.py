"""Left padding and batching, worked by hand."""

from __future__ import annotations

from holdfast.runtime.padding import batches, left_pad


def test_sequences_end_in_the_last_column() -> None:
    ids, mask = left_pad([[7, 8, 9], [5]], pad_id=3)
    assert ids.tolist() == [[7, 8, 9], [3, 3, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def plenty(tokens: int) -> int:
    return 1


def test_the_longest_go_first_and_equal_lengths_keep_their_order() -> None:
    found = batches([2, 9, 5, 9], batch_size=2, row_bytes=plenty, run_bytes=1 << 20)
    assert list(found) == [[1, 3], [2, 0]]


def test_a_batch_is_cut_where_it_would_need_too_much() -> None:
    """10 tokens x 400 bytes are 4,000 bytes a sequence: two fit into 9,000; of 5 tokens, four do."""

    def row_bytes(tokens: int) -> int:
        return 400 * tokens

    found = batches([10, 10, 10, 5, 5], batch_size=32, row_bytes=row_bytes, run_bytes=9_000)
    assert list(found) == [[0, 1], [2, 3], [4]]
    single = batches([10, 10], batch_size=32, row_bytes=row_bytes, run_bytes=1)
    assert list(single) == [[0], [1]]


def test_long_sequences_go_with_their_equals_only() -> None:
    found = batches([9, 8, 9, 5, 4], batch_size=4, row_bytes=plenty, run_bytes=100, equal_beyond=7)
    assert list(found) == [[0, 2], [1], [3, 4]]


def test_nothing_gives_no_batches() -> None:
    assert list(batches([], batch_size=4, row_bytes=plenty, run_bytes=100)) == []
