"""In CI nothing but tests that need an accelerator may be skipped: the rule in conftest.py, tried on a planted skip."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

TEST = "def test_planted():\n    pass\ndef test_other():\n    pass\n"
MARKED = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip(reason='no accelerator')\n" + TEST
UNMARKED = "import pytest\n@pytest.mark.skip(reason='planted')\n" + TEST
WHOLE_FILE = "import pytest\npytest.skip('planted', allow_module_level=True)\n" + TEST


@pytest.mark.parametrize(
    ("planted", "ci", "status"),
    [(UNMARKED, "true", 1), (WHOLE_FILE, "true", 1), (MARKED, "true", 0), (UNMARKED, "", 0)],
)
def test_in_ci_only_tests_that_need_an_accelerator_may_be_skipped(tmp_path, planted, ci, status):
    (tmp_path / "test_planted.py").write_text(planted)
    (tmp_path / "test_passing.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), "-p", "conftest"]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    environment = dict(os.environ, CI=ci, PYTHONPATH=str(ROOT / "tests"))
    assert subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True).returncode == status
