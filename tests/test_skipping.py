"""In CI nothing but tests that need an accelerator may be skipped: the rule in conftest.py, tried on a planted skip."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

MARKED = "@pytest.mark.gpu\n@pytest.mark.skip(reason='no accelerator')\n"
UNMARKED = "@pytest.mark.skip(reason='planted')\n"


@pytest.mark.parametrize(("mark", "ci", "status"), [(UNMARKED, "true", 1), (MARKED, "true", 0), (UNMARKED, "", 0)])
def test_a_skip_without_a_reason_fails_in_ci(tmp_path, mark, ci, status):
    planted = f"import pytest\n{mark}def test_planted():\n    pass\ndef test_other():\n    pass\n"
    (tmp_path / "test_planted.py").write_text(planted)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), "-p", "conftest"]
    command += ["--rootdir", str(tmp_path), str(tmp_path / "test_planted.py")]
    environment = dict(os.environ, CI=ci, PYTHONPATH=str(ROOT / "tests"))
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True).returncode == status
