"""What a server reads of a trainer's events: all of them, whatever lines stand between."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from llama_stack_meta_reference.post_training.progress import Progress, Reader
from llama_stack_meta_reference.training.plan import PROGRESS_FILE, Finished, Note

NOW = datetime(2024, 7, 23, tzinfo=UTC)


@pytest.mark.parametrize("noise", [1_500_000, 3_000_000, 2 << 20])
def test_a_line_longer_than_any_event_hides_nothing_behind_it(noise: int, tmp_path: Path) -> None:
    """A job whose end is not seen would be done again and fail in the end."""
    ends = Finished(time=NOW, iters=3, folder="result")
    lines = [Note(time=NOW, text="begins").model_dump_json(), "x" * noise, ends.model_dump_json()]
    (tmp_path / PROGRESS_FILE).write_text("\n".join(lines) + "\n")
    assert Progress(tmp_path).refresh().last == ends


def test_what_is_half_written_waits(tmp_path: Path) -> None:
    """The other half makes it an event."""
    file, line = tmp_path / PROGRESS_FILE, Note(time=NOW, text="\u2028 and more").model_dump_json()
    reader = Reader(tmp_path)
    assert reader.more() == []
    file.write_text(line[:20])
    assert reader.more() == []
    file.write_text(f"{line}\n")
    assert [event.event for event in reader.more()] == ["note"]
    assert reader.more() == []
