"""Names and hashes in columns are what lists of strings would be."""

import hashlib

import numpy as np
import pytest

from unlabel.columns import Digests, Names

NAMES = ["", "a/b.jpg", "Grüße 猫.jpg", "\udcff.jpg", "x" * 300, "🐈", "a/b.jpg"]  # \udcff: a byte that is no UTF-8
HASHES = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() for name in NAMES]


@pytest.mark.parametrize("times", [1, 1500])  # 1500: several blocks
def test_columns_are_sequences_of_strings(times: int) -> None:
    digests = np.frombuffer(bytes.fromhex("".join(HASHES * times)), np.uint8).reshape(-1, 32)
    for column, want in ((Names(NAMES * times), NAMES * times), (Digests(digests), HASHES * times)):
        assert column == want
        assert list(column) == want
        assert len(column) == len(want)
        assert [column[i] for i in (0, 3, -1)] == [want[i] for i in (0, 3, -1)]
        assert column[2:-1:2] == want[2:-1:2]
        rows = np.random.default_rng(0).integers(0, len(want), 50)
        assert column.take(rows) == [want[i] for i in rows]
        assert column.take(np.array([], np.int64)) == []
        assert column.index(want[2]) == 2
        assert "nothing" not in column
        assert column != [*want[:-1], "b"]
        assert column != want[:-1]
        for beyond in (len(want), -len(want) - 1):
            with pytest.raises(IndexError):
                column[beyond]
    assert Names() == Names([]) == []
