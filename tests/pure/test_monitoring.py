"""Alert rules and dashboard are valid, and each alarm is explained. That their metrics exist is tested on a cluster."""

import re
import shutil
import subprocess

import promql_parser
import pytest

from tests.pure.monitoring import DOCUMENT, FOLDER, metrics_named, rules


def test_every_expression_parses() -> None:
    assert len(metrics_named()) > 25
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum(rate(ghostserve:serving[5m])")


def test_every_alarm_is_explained_and_no_other() -> None:
    explained = re.findall(r"^## (GhostServe\w+)$", DOCUMENT.read_text(), re.MULTILINE)
    assert explained == [rule["alert"] for rule in rules()]
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in rules())


@pytest.mark.skipif(not shutil.which("promtool"), reason="NO PROMTOOL: when the alarms go off is not tested")
def test_the_alarms_go_off_when_they_shall() -> None:
    ran = subprocess.run(["promtool", "test", "rules", FOLDER / "alerts_test.yml"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
