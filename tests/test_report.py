"""The report: models and runs side by side, as text, CSV, LaTeX and one page that needs no other file."""

import json

import pandas as pd

from jqlib.__main__ import main

ROW = {"method": "rtn", "weights": "rtn", "w_bits": 4, "a_bits": 4, "kv_bits": 16, "ppl": 9.5, "ppl_low": 9.0,
       "ppl_high": 10.0, "kl": 0.25, "kl_low": 0.2, "kl_high": 0.3, "top1": 0.75, "seconds": 3}  # fmt: skip


def save(folder, **config):
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "05_w4a4_eval.json").write_text(json.dumps({"rows": [ROW], "config": config}))


def test_an_empty_folder_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no results/05_w4a4_eval.json under {tmp_path}: run ")


def test_models_and_runs_stand_side_by_side(tmp_path, capsys):
    save(tmp_path / "a_1", model="a_1", seed=0, seqlen=64, output_dir="x")
    save(tmp_path / "sweep" / "b,seed=1" / "b", model="b", seed=1, seqlen=64, output_dir="y")
    (tmp_path / "a_1" / "figures").mkdir()
    (tmp_path / "a_1" / "figures" / "05_table.png").write_bytes(b"picture")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("9.50") == 2
    table = pd.read_csv(tmp_path / "report.csv", keep_default_na=False)
    assert table.columns.tolist() == ["model", "run", "seed", *ROW]  # the seed differs, seqlen does not
    assert table.values.tolist() == [["a_1", "", 0, *ROW.values()], ["b", "sweep/b,seed=1", 1, *ROW.values()]]
    latex = (tmp_path / "report.tex").read_text()
    assert r"w\_bits" in latex
    assert r"a\_1 &  & 0 & rtn & rtn & 4 & 4 & 16 & 9.50 & 9.00 & 10.00" in latex
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>9.50</td>") == 2
    assert page.count("data:image/png;base64,cGljdHVyZQ==") == 1
    assert "<h2>a_1</h2>" in page
    assert "src=" not in page.replace('src="data:', "")
