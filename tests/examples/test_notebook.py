"""The notebook's code cells, one after another, with models of the quickstart's shape."""

import json

import pytest

from tests.helpers import ROOT
from tests.test_app import make_quickstart


@pytest.mark.slow
def test_notebook_runs_from_its_first_cell_to_its_last(small_files, tmp_path, monkeypatch):
    make_quickstart(small_files, tmp_path)
    (tmp_path / "autoregressive").mkdir()  # as in the project's folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(ROOT)])
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells, names = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"], {}
    for cell in cells:
        assert not cell["outputs"] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), "cell", "exec"), names)
    assert names["grid"].size == (8 * 64, 6 * 64) and len(names["grid"].getcolors(10**6)) > 100
    assert (tmp_path / "quickstart" / "pipeline" / "model_index.json").is_file()
