"""The compilers of chips that are not here know the options of every named group."""

import pytest

from genai_jax.training.compiler import GROUPS
from tests.kernels_pallas.target_process import need, report_of

pytestmark = pytest.mark.depends_on("compiler options")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("platform", "chips", "package"),
    [("tpu", ("v5e", "v6e"), "libtpu"), ("gpu", ("h200",), "jax_cuda13_plugin")],
)
def test_the_compilers_know_every_option(platform, chips, package):
    need(package)
    reports = [report_of("tests.training.compiler_targets", chip) for chip in chips]
    for report in reports:
        assert report["platform"] == platform
        assert set(report["refused"]) == {"made up"}, report["refused"]
    tried = {name for report in reports for name in report["tried"]}
    assert tried >= {name for name, group in GROUPS.items() if group.platform == platform}
