"""files.py: JSON files are replaced atomically, and private ones are readable by their owner only."""

import json
import os

import pytest

from author_dp.files import write_json
from author_dp.permissions import owner_only


def test_write_json_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "privacy.json"
    write_json(path, {"epsilon": 1.0})

    def crash(*args):
        assert json.loads(path.read_text()) == {"epsilon": 1.0}
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"epsilon": 2.0})
    assert json.loads(path.read_text()) == {"epsilon": 1.0}
    monkeypatch.undo()
    write_json(path, {"epsilon": 2.0})
    assert json.loads(path.read_text()) == {"epsilon": 2.0}


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o644)])
def test_write_json_sets_mode_before_content(tmp_path, monkeypatch, private, mode):
    monkeypatch.setattr("author_dp.files.USER_UMASK", 0o022)
    modes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(os.fstat(descriptor).st_mode & 0o777) or fsync(descriptor))
    path = tmp_path / "new" / "file.json"
    path.parent.mkdir()
    path.with_name("file.json.tmp").write_text("left by a crash")
    with owner_only():
        write_json(path, {"key": 1}, private=private)
    assert modes[0] == path.stat().st_mode & 0o777 == mode and json.loads(path.read_text()) == {"key": 1}
    assert not path.with_name("file.json.tmp").exists()
