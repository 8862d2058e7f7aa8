"""Files appear whole or not at all, and nothing is left beside them."""

import os

import pytest

from keras_glorot.tools._files import write_whole


def test_the_file_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")

    def write(draft):
        draft.write_text("new")
        assert target.read_text() == "old"

    write_whole(target, "Argument `path`", write)
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt, MemoryError])
def test_after_an_error_the_old_file_is_there(error, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")

    def fail(draft):
        draft.write_text("half")
        raise error

    with pytest.raises(ValueError if isinstance(error, OSError) else error):
        write_whole(target, "Argument `path`", fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
