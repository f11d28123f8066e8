"""Files are whole or absent, and what was there is never lost."""

import pytest

from tfswa_lab.durable import parts_of


def write(paths, content, **options):
    with parts_of(paths, **options) as parts:
        for part in parts:
            part.parent.mkdir(exist_ok=True)
            part.write_text(content)


def test_two_at_once_do_not_share_their_unfinished_files(tmp_path):
    path = tmp_path / "a.wav"
    with parts_of([path]) as first, parts_of([path]) as second:
        assert first != second
        first[0].write_text("first")
        second[0].write_text("second")
    assert path.read_text() == "first"  # the last to end
    assert [*tmp_path.iterdir()] == [path]


def test_the_second_does_not_replace_the_first_unless_wanted(tmp_path):
    paths = [tmp_path / "new" / "a.wav", tmp_path / "new" / "b.wav"]
    write(paths, "first", overwrite=False, folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"a\.wav exists"):
        write(paths, "second", overwrite=False, folder=tmp_path)
    assert [path.read_text() for path in paths] == ["first", "first"]
    write(paths, "second", folder=tmp_path)
    assert [path.read_text() for path in paths] == ["second", "second"]
    assert sorted(tmp_path.rglob("*.*")) == paths


@pytest.mark.parametrize("there", [0, 1, 2])
def test_where_one_rename_fails_none_has_happened(tmp_path, there):
    paths = [tmp_path / "x" / "a", tmp_path / "x" / "b", tmp_path / "c"]
    if there:
        write(paths[:there], "old")
    paths[2].mkdir()
    before = {path: path.read_text() for path in paths[:there]}
    with pytest.raises(OSError, match="c"):
        write(paths, "new", folder=tmp_path)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "x").exists() == bool(there)


def test_disks_without_second_names_keep_what_was_there_too(tmp_path, monkeypatch):
    def refused(path, target):
        raise PermissionError("no hard links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    paths = [tmp_path / "a", tmp_path / "b"]
    write(paths, "old")
    write(paths, "new")
    assert [path.read_text() for path in paths] == ["new", "new"]
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(OSError, match="b"):
        write(paths, "newest")
    assert paths[0].read_text() == "new"
    assert sorted(tmp_path.iterdir()) == paths
