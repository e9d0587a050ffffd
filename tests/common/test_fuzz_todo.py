"""TODO.md as people edit it by hand: what is not the table of training stays as it is."""

import re

from hypothesis import example, given
from hypothesis import strategies as st
from mutations import bounded

from common.progress import TODO_HEADER, TODO_HEADING, reset_todo_md, update_todo_md

LINES = st.sampled_from(
    [
        *TODO_HEADER,
        "| 1 | not started | | | | |",
        "| 2 | done | 0.1 | 99.0 | yes | 2020-01-01 00:00:00 |",
        "|2|",
        "| 2",
        "|  | 2 |",
        "|",
        "||||||||",
        TODO_HEADING,
        "Data set: mnist",
        "# Notes",
        "",
        " ",
        "my own words | with a bar",
    ]
) | st.text(max_size=20)
ENDS = st.sampled_from(["\n", "\r\n", "\n", "\r", ""])
TODOS = st.lists(st.tuples(LINES, ENDS), max_size=12).map(
    lambda lines: "".join(map("".join, lines)).encode(errors="surrogatepass")
) | st.binary(max_size=60)


def around_the_table(content: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the first progress table, which is ours; all, if there is none.

    The table is the header's line and those after it that begin with a bar.
    """
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", content)
    header = [line.rstrip(b"\r\n").decode(errors="replace") for line in lines]
    if TODO_HEADER[0] not in header:
        return content, b""
    start = header.index(TODO_HEADER[0])
    end = start + 1
    while end < len(lines) and lines[end].startswith(b"|"):
        end += 1
    return b"".join(lines[:start]), b"".join(lines[end:])


def rows_of(content: bytes) -> list[list[str]]:
    before, after = around_the_table(content)
    table = content[len(before) : len(content) - len(after)].decode(errors="replace")
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


@given(content=TODOS, epoch=st.integers(1, 4), epochs=st.integers(1, 4), reset=st.booleans())
@example(content=b"## Training progress\n\nData set: mnist", epoch=1, epochs=1, reset=True)
@example(content=b"# Mine\r\n\r\ntext\r\n", epoch=1, epochs=2, reset=True)
def test_todo_files_keep_what_is_not_ours(tmp_path, content, epoch, epochs, reset):
    path = tmp_path / "TODO.md"
    path.write_bytes(content)
    before, after = around_the_table(content)
    with bounded():
        if reset:
            reset_todo_md(epochs, path, "mnist")
            # The line above the table that names the data set is ours too.
            before = re.sub(rb"(\A|\n)Data set: [^\n]*\n\r?\n\Z", rb"\1", before)
            rows = rows_of(path.read_bytes())
            assert [row[:2] for row in rows] == [[str(i + 1), "not started"] for i in range(epochs)]
            again = path.read_bytes()
            reset_todo_md(epochs, path, "mnist")
            assert path.read_bytes() == again
        update_todo_md(epoch, 0.5, 97.0, True, path)
        once = path.read_bytes()
        update_todo_md(epoch, 0.5, 97.0, True, path)
        update_todo_md(epoch, 0.25, 98.0, False, path)
    now = path.read_bytes()
    assert once.startswith(before) and now.startswith(before)
    assert once.endswith(after) and now.endswith(after)
    assert len(rows_of(once)) == len(rows_of(now))
    filled = [row[1:5] for row in rows_of(now) if row[:1] == [str(epoch)]]
    assert filled == [["done", "0.2500", "98.00", "no"]]


def test_a_long_todo_file_is_quick(tmp_path):
    path = tmp_path / "TODO.md"
    path.write_bytes(b"x" * 10**7 + b"\n" * 10**6 + TODO_HEADER[0].encode() + b"\n|" * 10**5)
    with bounded(seconds=10):
        update_todo_md(1, 0.5, 97.0, True, path)
        reset_todo_md(10, path, "mnist")
