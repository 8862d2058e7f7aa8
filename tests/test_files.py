"""Files appear whole or not at all, and nothing is left beside them."""

import os

import pytest

from keras_glorot.tools._files import drafted


def write(text):
    return lambda path: path.write_text(text)


def test_the_file_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")
    with drafted(target, "Argument `path`") as put:
        assert target.read_text() == "old"
        put(write("new"))
        assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt, MemoryError])
def test_after_an_error_the_old_file_is_there(error, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise error

    expected = ValueError if isinstance(error, OSError) else error
    with pytest.raises(expected), drafted(target, "Argument `path`") as put:
        put(fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_folders_of_others_stay(tmp_path):
    own = tmp_path / ".keras-glorot-0123456789abcdef"
    own.mkdir()
    with drafted(tmp_path / "out.keras", "-o") as put:
        with drafted(tmp_path / "other.keras", "-o") as put_other:
            put_other(write("other"))
        put(write("out"))
    assert sorted(os.listdir(tmp_path)) == [own.name, "other.keras", "out.keras"]
