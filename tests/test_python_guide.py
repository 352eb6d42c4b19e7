"""The guide to runs in Python, word for word."""

import json
import re

import matplotlib
import numpy as np
import pytest

from tests.conftest import ROOT


@pytest.mark.depends_on("whole runs")
def test_the_guide_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert "['3', '3', '3', '3'] 100" in said
    with np.load("samples.npz") as file:
        assert {"images", "levels", "labels", "label_names", "seed", "step"} < set(file.files)
    rows = (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["label"] for row in rows] == ["0", "1", "2", "3"]
    assert names["images"].shape == (20, 8, 8, 1) and names["weights"].shape == (2, 4, 8, 8)
    assert float(names["metrics"]["loss"]) < 0.05
    plot = [line for line in text.splitlines() if "load(" in line or ".sample(" in line]
    assert len(plot) >= 2
    names["plt"].close("all")
