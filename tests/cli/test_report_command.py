"""The command report: the page of a run, made again."""

import shutil

from conftest import call


def test_the_report_is_made_again(finished, work):
    """With the same bits, from what the folder tells."""
    page = (finished[0] / "report.html").read_bytes()
    shutil.copytree(finished[0], work / "copy")
    (work / "copy" / "report.html").unlink()
    assert call("report", "copy") == (0, "written: copy/report.html\n", "")
    assert (work / "copy" / "report.html").read_bytes() == page
    (work / "copy" / "manifest.json").unlink()
    refused = "error: copy holds no finished run: no manifest.json\n"
    assert call("report", "copy") == (2, "", refused)
    (work / "copy" / "config.json").write_text("{}")
    code, _, err = call("report", "copy")
    assert code == 2
    assert err.startswith("error: copy was not written by ipr-jax refine; for a run of shards.ref")
    code, _, err = call("report", "nowhere")
    assert (code, err) == (2, "error: no config.json in nowhere: there is no folder nowhere\n")
