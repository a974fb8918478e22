"""Rows that are kept as their canonical JSON are the rows that were given."""

import io
import tracemalloc
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from server.api.submission import choose_rows
from server.api.train_schemas import TrainBody
from server.model.text.chat import ChatMessage
from server.training.datasets import DatasetStore
from server.training.files import FileStore, RowSources
from server.training.json_schema import canonical
from server.training.rows import CanonicalRows, CompletionRow, MessagesRow, Row, TextRow, kind_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
TURN = st.builds(ChatMessage, st.sampled_from(["system", "user"]), TEXT)
SCHEMA = st.none() | st.sampled_from([{}, {"minimum": 1.5, "$comment": "ä"}]).map(canonical)
ANSWER = st.builds(ChatMessage, st.just("assistant"), TEXT)
ROW: st.SearchStrategy[Row] = st.one_of(
    st.builds(CompletionRow, TEXT, TEXT, SCHEMA),
    st.builds(TextRow, TEXT),
    st.builds(lambda schema, *turns: MessagesRow(turns, schema=schema), SCHEMA, TURN, ANSWER, TURN, ANSWER),
)


@given(st.lists(ROW, max_size=6), st.data())
def test_workers_are_restarted(rows: list[Row], data: st.DataObject) -> None:
    kept = CanonicalRows.of(rows)
    assert len(kept) == len(rows)
    assert list(kept) == rows
    assert [kept[number] for number in range(len(rows))] == rows
    assert list(kept[1:3]) == rows[1:3]
    assert kept.kinds() == Counter(map(kind_of, rows))
    flags = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    assert list(kept.chosen(flags)) == [row for row, flag in zip(rows, flags, strict=True) if flag]


def test_rare_characters_take_no_more_memory(tmp_path: Path) -> None:
    """Of a data set whose every line has one, and a share of which is held out."""
    lines = [b'{"text":"%d' % number + b"a" * 1_000_000 + "\U0001f600".encode() + b'"}\n' for number in range(24)]
    datasets, files = DatasetStore(tmp_path / "datasets"), FileStore(tmp_path / "files")
    dataset = datasets.put(io.BytesIO(b"".join(lines)), "a.jsonl")
    body = TrainBody.model_validate({"name": "codes", "dataset": dataset.id, "validation": 0.5})
    tracemalloc.start()
    try:
        rows = choose_rows(body, RowSources(datasets, files))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(rows.train), len(rows.validation)) == (8, 16)
    assert peak < 2 * dataset.stored_bytes
